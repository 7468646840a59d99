"""A disk on which one operation fails, in the process itself: used by test_unkillable

While `FaultyDisk` is entered, what Python does to files below a folder is counted. One operation can be chosen to fail:
the process is killed there (`Killed` is raised, and no operation after it does anything), the power is cut, or an
`OSError` is raised."""
import builtins, errno, io, os, secrets, shutil, stat
from contextlib import suppress
from pathlib import Path

KILLS = 'killed before', 'killed after', 'torn write', 'power cut, data lost', 'power cut, all lost'
ERRORS = 'ENOSPC', 'EIO'


class Killed(BaseException): "The process is gone: nothing that it would still do may reach the disk"


def is_temporary(path): return path.name[0] == '.' and path.suffix == '.tmp'


class _File(io.FileIO):
    "A file whose operations are counted"
    def __init__(self, disk, path):
        self.disk, self.path = disk, path
        super().__init__(path, 'xb')
        disk.undo.append((Path(path).parent, lambda: disk.real.unlink(path)))

    def write(self, data):
        data, at = memoryview(data).cast('B'), os.fstat(self.fileno())
        if at.st_ino not in self.disk.dirty: self.disk.dirty[at.st_ino] = os.dup(self.fileno()), at.st_size
        return self.disk.do('write', self.path, lambda: super(_File, self).write(data),
                            torn=lambda: super(_File, self).write(data[:len(data)//2]))

    def close(self):
        if self.closed: return
        try:
            if not self.disk.dead: self.disk.do('close', self.path, lambda: None)
        finally: super().close()


class FaultyDisk:
    "A context in which operation number `at` below `folder` fails as `how` says; `ops` are names and paths so far"
    def __init__(self, folder, at=None, how=None):
        self.folder, self.at, self.how = Path(folder), at, how
        self.ops, self.dead, self.failed = [], False, False
        self.undo = []      # how to undo what was done to names since their folder was flushed
        self.dirty = {}     # inode → file descriptor and flushed length, of files written to since they were flushed
        self.graves = self.folder.with_name(f'{self.folder.name}-graves')
        self.real = type('real', (), {k: staticmethod(getattr(o, k)) for o, k in self.names})

    names = [(os, k) for k in ('fsync', 'replace', 'rename', 'unlink', 'link', 'symlink', 'mkdir')]
    names += [(shutil, 'rmtree')]

    def __enter__(self):
        self.graves.mkdir(exist_ok=True)
        places = [*self.names, (os, 'remove'), (builtins, 'open'), (io, 'open')]
        self.old = [(o, k, getattr(o, k)) for o, k in places]
        for o, k, f in self.old: setattr(o, k, getattr(self, k) if hasattr(self, k) else self.forbidden(f))
        return self

    def __exit__(self, *exc):
        for o, k, f in self.old: setattr(o, k, f)
        for fd, _ in self.dirty.values(): os.close(fd)

    def mine(self, path): return isinstance(path, (str, os.PathLike)) and self.folder in Path(path).parents

    def forbidden(self, f):
        def _f(path, *args, **kwargs):
            assert not self.mine(path), f'{path} is written past the file layer'
            return f(path, *args, **kwargs)
        return _f

    def do(self, name, path, f, torn=None):
        "One operation"
        if self.dead: raise Killed
        self.ops.append((name, str(Path(path).relative_to(self.folder))))
        if len(self.ops) - 1 != self.at: return f()
        self.failed = True
        if self.how in ERRORS:
            if torn: torn()
            code = getattr(errno, self.how)
            raise OSError(code, os.strerror(code))
        self.dead = True
        if self.how == 'torn write': torn and torn()
        elif self.how != 'killed before':
            with suppress(OSError): f()
        if self.how.startswith('power cut'): self.cut_power()
        raise Killed

    def cut_power(self):
        for fd, length in self.dirty.values(): os.ftruncate(fd, length)
        if self.how == 'power cut, all lost':
            for _, f in reversed(self.undo): f()

    def grave(self, path):
        "A name of a file under which it outlives its removal"
        res = self.graves/secrets.token_hex(8)
        self.real.link(path, res, follow_symlinks=False)
        return res

    # --- what takes the place of the functions of `os`

    def open(self, path, mode='r', *args, **kwargs):
        real = next(f for o, k, f in self.old if (o, k) == (builtins, 'open'))
        writes = set(mode) & set('wxa+') and not os.path.isdir(path)      # a file without a name is made in a folder
        if not (writes and self.mine(path)): return real(path, mode, *args, **kwargs)
        new = mode == 'xb' or mode == 'wb' and is_temporary(Path(path).parent)      # as torch in a folder to be
        assert new, f'{path} is written past the file layer'
        return self.do('open', path, lambda: io.BufferedWriter(_File(self, path)))

    def fsync(self, fd):
        found = os.fstat(fd)
        path = next(p for p in [self.folder, *self.folder.rglob('*')] if os.path.samestat(p.lstat(), found))
        if stat.S_ISDIR(found.st_mode):
            def flush(): self.undo = [(p, f) for p, f in self.undo if p != path]
            return self.do('fsync of the folder', path, flush)
        def flush():
            if pair := self.dirty.pop(found.st_ino, None): os.close(pair[0])
        self.do('fsync', path, flush)

    def rename(self, a, b): self.replace(a, b)

    def replace(self, a, b):
        if not self.mine(b): return self.real.replace(a, b)
        def f():
            there = os.path.lexists(b)
            if there and os.path.samestat(os.lstat(a), os.lstat(b)): return      # as with two names of one file
            old = self.grave(b) if there else None
            self.real.replace(a, b)
            def undo():
                self.real.replace(b, a)
                if old: self.real.replace(old, b)
            self.undo.append((Path(b).parent, undo))
        self.do('rename', b, f)

    def unlink(self, path, *args, **kwargs):
        if not self.mine(path): return self.real.unlink(path, *args, **kwargs)
        def f():
            if not os.path.lexists(path): return self.real.unlink(path)
            old = self.grave(path)
            self.real.unlink(path)
            self.undo.append((Path(path).parent, lambda: self.real.replace(old, path)))
        self.do('unlink', path, f)

    def link(self, a, b):
        if not self.mine(b): return self.real.link(a, b)
        def f():
            self.real.link(a, b)
            self.undo.append((Path(b).parent, lambda: self.real.unlink(b)))
        self.do('link', b, f)

    def symlink(self, a, b):
        if not self.mine(b): return self.real.symlink(a, b)
        def f():
            self.real.symlink(a, b)
            self.undo.append((Path(b).parent, lambda: self.real.unlink(b)))
        self.do('symlink', b, f)

    def rmtree(self, path):
        if not self.mine(path): return self.real.rmtree(path)
        def f():
            old = self.graves/secrets.token_hex(8)
            shutil.copytree(path, old, copy_function=self.real.link)
            self.real.rmtree(path)
            self.undo.append((Path(path).parent, lambda: self.real.replace(old, path)))
        self.do('rmtree', path, f, torn=lambda: self.real.unlink(max(Path(path).iterdir())))

    def mkdir(self, path, *args, **kwargs):
        if not self.mine(path): return self.real.mkdir(path, *args, **kwargs)
        def f():
            self.real.mkdir(path, *args, **kwargs)
            self.undo.append((Path(path).parent, lambda: self.real.rmtree(path)))
        self.do('mkdir', path, f)
