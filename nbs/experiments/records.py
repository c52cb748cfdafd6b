"Rows of results in csv files that outlive an interrupted run, and how a notebook shows them"
import csv, io, math, os, platform
from importlib import metadata
from pathlib import Path

results = Path(__file__).parent/'results'

def processor():
    "What the system calls the processor"
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [l.split(':', 1)[1].strip() for l in lines if l.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()

def version(package):
    try: return metadata.version(package)
    except metadata.PackageNotFoundError: return ''

def surroundings():
    "What a measurement was made with"
    import torch
    peers = {o: version(o) for o in ('reformer_pytorch', 'transformers')}
    return dict(torch=torch.__version__, **peers,
                python=platform.python_version(), threads=torch.get_num_threads(), cores=os.cpu_count(), processor=processor())

def line(values):
    out = io.StringIO()
    csv.writer(out, lineterminator='\n').writerow(values)
    return out.getvalue()

def append(path, *rows):
    "Write rows at the end of a file in one piece, with a head if it is new; columns must be those that it has"
    path,head = Path(path),list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and (old := path.read_text(encoding='utf-8').partition('\n')[0]+'\n') != line(head):
        raise ValueError(f'{path.name} has the columns {old.strip()}, the new rows {line(head).strip()}; move the old file away')
    text = '' if path.exists() else line(head)
    with open(path, 'a', encoding='utf-8') as f:
        f.write(text + ''.join(line(row.values()) for row in rows))
        f.flush()
        os.fsync(f.fileno())

def number(text):
    for kind in (int, float):
        try: return kind(text)
        except ValueError: pass
    return text

def read(path):
    "Rows of a file as dictionaries, numbers as numbers; none if there is no file"
    path = results/path
    if not path.exists(): return []
    with open(path, encoding='utf-8', newline='') as f:
        return [{k: number(v) for k,v in row.items()} for row in csv.DictReader(f)]

def slope(points):
    "That of the least-squares line through the logarithms of (x, y)"
    x,y = ([math.log(o) for o in axis] for axis in zip(*points))
    mx,my = sum(x)/len(x),sum(y)/len(y)
    return sum((a-mx)*(b-my) for a,b in zip(x, y))/sum((a-mx)**2 for a in x)

def table(rows, *columns):
    "Some columns, or all, as a Markdown table; says so if there is nothing yet"
    from IPython.display import Markdown
    if not rows: return Markdown('*Not measured yet.*')
    columns = columns or tuple(rows[0])
    cells = [columns, ['---']*len(columns), *([row.get(k, '') for k in columns] for row in rows)]
    return Markdown('\n'.join('| '+' | '.join(map(str, o))+' |' for o in cells))
