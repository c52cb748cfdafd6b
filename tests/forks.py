"Processes that are there at once: forks of one that has imported what takes seconds"
import multiprocessing, os, sys, time

kind = 'forkserver' if 'forkserver' in multiprocessing.get_all_start_methods() else 'spawn'
processes = multiprocessing.get_context(kind)
if kind=='forkserver':   # one for the notebooks and for tests
    processes.set_forkserver_preload(['nbdev.test', 'matplotlib.pyplot', 'reformer_nb.trainer'])

def redirect(said, complaint):
    "What is printed goes to two files, or both to one"
    for path,o in zip((said, complaint), (1, 2)): os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), o)

def enter(code, words, said, complaint):
    redirect(said, complaint)
    sys.argv = ['-c', *words]
    exec(compile(code, 'program', 'exec'), dict(__name__='__main__'))

class Program:
    "Code that runs in a process of its own, with `words` as its arguments"
    def __init__(self, folder, code, *words):
        folder.mkdir(parents=True, exist_ok=True)
        self.said,self.complaint = (folder/f'{time.monotonic_ns()}.{o}' for o in ('out', 'err'))
        self.process = processes.Process(target=enter, args=(code, [*map(str, words)], str(self.said), str(self.complaint)))
        self.process.start()

    def wait_for(self, text, times=1):
        "Until it has said so, so often"
        while not (self.said.exists() and self.said.read_text().count(text)>=times):
            assert self.process.is_alive(), self.end()
            time.sleep(.002)

    def end(self):
        "Exit code, below 0 if a signal ended it, and what it wrote to standard output and error"
        self.process.join()
        return self.process.exitcode,*(o.read_text() if o.exists() else '' for o in (self.said, self.complaint))
