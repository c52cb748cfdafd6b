"Compile the kernels for a GPU that need not be there, 90 for an H100, and print what they take; `--all` for more sizes"
import os, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.language import constexpr
from triton.runtime import driver
from triton.runtime.jit import MockTensor
from reformer_nb.triton_forward import forward_kernel, n_warps, tile_rows
from reformer_nb.triton_hashing import hash_kernel, hash_tile
from reformer_nb.triton_lsh import backward_kernel, delta_kernel
from reformer_nb.triton_tiles import KernelCall

class Absent:
    "Stands for a driver where there is no GPU"
    def __init__(self, arch=90): self.arch = arch
    def get_current_target(self): return GPUTarget('cuda', self.arch, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

def used(compiled):
    "Registers and spilled bytes of a thread, and shared memory of a program"
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(compiled.asm['cubin'])
        f.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), 'backends', 'nvidia', 'bin', 'cuobjdump')
        text = subprocess.run([tool, '-res-usage', f.name], capture_output=True, text=True, check=True).stdout
    return [int(o) for o in re.search(r'REG:(\d+) STACK:(\d+)', text).groups()] + [compiled.metadata.shared]

def compiled(dtype, m, d, rare):
    "The kernels for rows of one width, with every option that adds code if `rare`"
    x,f32,i32,flag = (MockTensor(o) for o in (dtype, torch.float32, torch.int32, torch.bool))
    row = d*dtype.itemsize
    constants = dict(dropout=rare, r=4, m=m, d=d, e=d, causal=True, strict=False, look_back='rounds' if rare else 'none', precision='tf32x3')
    call = KernelCall(i32, i32 if rare else None, i32 if rare else None, i32, flag if rare else None, flag if rare else None, f32, 8, 8192, 8192, 8192,
                .5, 2**40, 5, 1.25, **{k: constexpr(o) for k,o in constants.items()}, tile=constexpr(tile_rows(m, row, 8192)))
    options = dict(grid=(1,), num_warps=n_warps(row))
    yield 'forward',call.tile.value,used(forward_kernel.warmup(x, x, x, f32, f32, call, 2, **options))
    call = call._replace(tile=constexpr(tile_rows(m, row, 4096)))
    yield 'delta',call.tile.value,used(delta_kernel.warmup(x, x, f32, call, **options))
    yield 'backward',call.tile.value,used(backward_kernel.warmup(x, x, x, f32, f32, f32, f32, x, x, call, 2, **options))
    tile,block = hash_tile(d)
    digits = ((f32, 1, 64, 0, i32),(f32, 8, 18, 0, i32)) if rare else ((f32, 1, 64, 128, None),)
    yield 'hash',tile,used(hash_kernel.warmup(x, digits, MockTensor(torch.int16), flag if rare else None, 2304, 8, 8192, 8192*8*d, d, 8*d, 4, d, tile, block, grid=(1,)))

if __name__=='__main__':
    arch = next((int(o) for o in sys.argv[1:] if o.isdigit()), 90)
    driver.set_active(Absent(arch))
    cases = [(torch.bfloat16 if arch>=80 else torch.float16, 64, 64, False)]
    if '--all' in sys.argv:
        cases += [(dtype, m, d, rare) for dtype in (torch.bfloat16, torch.float16, torch.float32) for m,d in ((16, 16), (128, 64), (64, 128), (64, 256))
                  for rare in (False, True)]
    for case in cases:
        for name,tile,(registers,spilled,shared) in compiled(*case):
            print(name, *case, f'tile {tile}: {registers} registers, {spilled} bytes spilled, {shared} bytes shared', flush=True)
            if arch>=90 and case[0]!=torch.float32 and not case[3] and case[2]<=128 and spilled: sys.exit('spills')
            if shared>(227 if arch>=90 else 64)*1024: sys.exit('more shared memory than the GPU has')
