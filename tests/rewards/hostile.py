"""
Programs that try to do harm, to look around, or to pass tests they do not pass.

Each is the body of `solve(number)`, which the tests expect to return the number doubled. None does. A program prints
`EFFECT` where it got what it wanted. `CANARY` (a file), `FOLDER` (around it), `PID` (a process), `TRAINER` (the process
that called), `PORT` (someone listens) and `SECRET` (in the environment) stand for the things it goes for.
"""

from __future__ import annotations


# name -> (body of the function, pattern that the reason of the failure must match)
ATTEMPTS: dict[str, tuple[str, str]] = {
    # Using up what there is.
    "fork bomb": ("while True:\n    os.fork()\n    print('EFFECT')", "PermissionError"),
    "thread bomb": (
        "import threading\nwhile True:\n    threading.Thread(target=time.sleep, args=(9,)).start()\n    print('EFFECT')",
        "can't start new thread",
    ),
    "pool of processes": ("import multiprocessing\nmultiprocessing.Pool(4)\nprint('EFFECT')", "Error"),
    "memory at once": ("data = bytearray(2**33)\nprint('EFFECT')", "MemoryError"),
    "memory step by step": ("data = []\nwhile True:\n    data.append(bytearray(2**20))", "MemoryError"),
    "memory mapped and shared": ("import mmap\nmmap.mmap(-1, 2**34)\nprint('EFFECT')", "Error"),
    "memory in anonymous files": (
        "for _ in range(20):\n    fd = os.memfd_create('x')\n    print('EFFECT')\n    os.write(fd, b'x' * 2**20)",
        "PermissionError",
    ),
    "infinite output": ("while True:\n    print('x' * 1000)", "printed more"),
    "infinite output in small pieces": ("while True:\n    os.write(2, b'x')", "printed more"),
    "endless loop": ("while True:\n    pass", "ended"),
    "endless loop in C": ("import re\nre.match('(a|a)*b', 'a' * 100)", "ended"),
    "sleeping": ("time.sleep(1000)", "more than 2 s"),
    "sleeping before the tests": ("pass\ntime.sleep(1000)", "more than 2 s"),
    "ignoring every signal": (
        "for number in range(1, 65):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
        "ended",
    ),
    "waiting for a signal": ("signal.pause()", "more than 2 s"),
    "stopping itself": ("os.kill(os.getpid(), signal.SIGSTOP)", "PermissionError"),
    "deep recursion": ("return solve(number)", "RecursionError"),
    "deeper recursion": ("sys.setrecursionlimit(2**30)\nreturn (lambda f: f(f))(lambda f: f(f))", "ended|MemoryError"),
    "recursion in C": ("data = []\nfor _ in range(10**6):\n    data = [data]\nreturn data", "Recursion|ended"),
    "huge integers": ("return 7 ** (7 ** (7 ** 7))", "ended|MemoryError"),
    "a huge answer": ("return 'x' * (64 * 2**20)", "too long|MemoryError|more than"),
    "an endless answer": ("import itertools\nreturn [*itertools.count()]", "MemoryError|ended|more than"),
    "a nested answer": (
        "data = '[' * 10**6 + ']' * 10**6\nfor fd in range(3, 32):\n    try:\n"
        "        os.write(fd, b'{\"value\": ' + data.encode() + b'}\\n')\n    except OSError:\n        pass",
        "RecursionError|more than",
    ),
    "a huge exception": ("raise ValueError('x' * 10**8)", "ValueError: x"),
    "filling the disk": (
        "for name in range(100):\n    with open(str(name), 'wb') as file:\n        file.write(b'x' * 2**20)\ntime.sleep(9)",
        "wrote more",
    ),
    "one big file": (
        "with open('x', 'wb') as file:\n    for _ in range(64):\n        file.write(b'x' * 2**20)\nprint('EFFECT')",
        "File too large",
    ),
    "one big sparse file": ("with open('x', 'wb') as file:\n    file.truncate(2**40)\nprint('EFFECT')", "too large"),
    "deleted files that are still open": (
        "files = []\nwhile True:\n    files.append(open('x', 'wb'))\n    os.remove('x')",
        "Too many open files",
    ),
    "many files": ("for name in range(10**9):\n    open(str(name), 'w').close()", "wrote more|more than|ended"),
    "many folders": ("os.mkdir('a')\nprint('EFFECT')", "PermissionError"),
    "many descriptors": ("fds = []\nwhile True:\n    fds.append(os.dup(1))", "Too many open files"),
    # Reaching out.
    "TCP": ("import socket\nsocket.create_connection(('127.0.0.1', PORT))\nprint('EFFECT')", "PermissionError|Error"),
    "UDP": (
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))\nprint('EFFECT')",
        "PermissionError",
    ),
    "a name looked up": ("import socket\nprint('EFFECT', socket.getaddrinfo('localhost', PORT))", "Error"),
    "a URL": (
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:PORT').read()\nprint('EFFECT')",
        "Error",
    ),
    "Unix sockets": ("import socket\nsocket.socket(socket.AF_UNIX)\nprint('EFFECT')", "PermissionError"),
    "pair of sockets": ("import socket\nsocket.socketpair()\nprint('EFFECT')", "PermissionError"),
    # Files of others.
    "writing outside": ("open('CANARY', 'w').write('EFFECT')\nprint('EFFECT')", "PermissionError"),
    "appending outside": ("open('CANARY', 'a').write('EFFECT')\nprint('EFFECT')", "PermissionError"),
    "a new file outside": ("open('FOLDER/new', 'w')\nprint('EFFECT')", "PermissionError"),
    "a new folder outside": ("os.mkdir('FOLDER/new')\nprint('EFFECT')", "PermissionError"),
    "emptying a file": ("os.truncate('CANARY', 0)\nprint('EFFECT')", "PermissionError"),
    "emptying a file opened to read": (
        "os.open('CANARY', os.O_RDONLY | os.O_TRUNC)\nprint('EFFECT')",
        "PermissionError",
    ),
    "emptying a file opened for neither": ("os.open('CANARY', 3 | os.O_TRUNC)\nprint('EFFECT')", "PermissionError"),
    "removing a file": ("os.remove('CANARY')\nprint('EFFECT')", "PermissionError"),
    "moving a file in": ("os.rename('CANARY', 'mine')\nprint('EFFECT')", "Error"),
    "moving a file out": ("open('a', 'w').close()\nos.rename('a', 'CANARY')\nprint('EFFECT')", "Error"),
    "permissions": ("os.chmod('CANARY', 0o777)\nprint('EFFECT')", "PermissionError"),
    "permissions through a descriptor": (
        "fd = os.open('CANARY', os.O_PATH)\nos.chmod(f'/proc/self/fd/{fd}', 0o777)\nprint('EFFECT')",
        "PermissionError",
    ),
    "owner": ("os.chown('CANARY', 1, 1)\nprint('EFFECT')", "PermissionError"),
    "times": ("os.utime('CANARY', (1, 1))\nprint('EFFECT')", "PermissionError"),
    "attributes": ("os.setxattr('CANARY', 'user.x', b'EFFECT')\nprint('EFFECT')", "PermissionError"),
    "a link out": ("os.symlink('CANARY', 'a')\nopen('a', 'w')\nprint('EFFECT')", "PermissionError"),
    "a hard link": ("os.link('CANARY', 'a')\nopen('a', 'w')\nprint('EFFECT')", "Error"),
    "the way up": ("open('../' * 20 + 'CANARY'[1:]).read()\nprint('EFFECT')", "PermissionError"),
    "reading a file": ("print('EFFECT', open('CANARY').read())", "PermissionError"),
    "reading the users": ("print('EFFECT', open('/etc/passwd').read())", "PermissionError"),
    "listing the home folder": ("print('EFFECT', os.listdir('HOME'))", "PermissionError"),
    "listing /": ("print('EFFECT', os.listdir('/'))", "PermissionError"),
    "listing the temporary files": ("print('EFFECT', os.listdir('/tmp'))", "PermissionError"),
    "a device": ("print('EFFECT', open('/dev/mem', 'rb').read(1))", "Error"),
    "a device of its own": ("os.mknod('a', 0o60600, os.makedev(8, 0))\nprint('EFFECT')", "PermissionError"),
    "another root": ("os.chroot('.')\nprint('EFFECT')", "PermissionError"),
    # Other processes.
    "the environment": (
        "text = str(dict(os.environ)) + str(os.environb)\nprint('EFFECT' if 'SECRET' in text else '')",
        "AssertionError",
    ),
    "the environment of the trainer": ("print('EFFECT', open('/proc/TRAINER/environ').read())", "PermissionError"),
    "its own environment": ("print('EFFECT', open('/proc/self/environ').read())", "PermissionError"),
    "the environment in C": (
        "import ctypes\nctypes.CDLL(None).getenv.restype = ctypes.c_char_p\n"
        "print('EFFECT' if ctypes.CDLL(None).getenv(b'NAME_OF_SECRET') else '')",
        "AssertionError",
    ),
    "the trainer's memory": ("open('/proc/TRAINER/mem', 'r+b')\nprint('EFFECT')", "PermissionError"),
    "the trainer's files": ("print('EFFECT', os.readlink('/proc/TRAINER/cwd'))", "PermissionError"),
    "the trainer's descriptors": ("print('EFFECT', os.listdir('/proc/TRAINER/fd'))", "PermissionError"),
    "killing the trainer": ("os.kill(os.getppid(), signal.SIGTERM)\nprint('EFFECT')", "PermissionError"),
    "stopping the trainer": ("os.kill(TRAINER, signal.SIGSTOP)\nprint('EFFECT')", "PermissionError"),
    "killing another": ("os.kill(PID, signal.SIGKILL)\nprint('EFFECT')", "PermissionError"),
    "killing another through a descriptor": (
        "fd = os.pidfd_open(PID)\nsignal.pidfd_send_signal(fd, signal.SIGKILL)\nprint('EFFECT')",
        "PermissionError",
    ),
    "killing another by input and output": (
        "import fcntl\nread, write = os.pipe()\nfcntl.fcntl(read, 10, signal.SIGKILL)\nfcntl.fcntl(read, fcntl.F_SETOWN, PID)\n"
        "fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC)\nos.write(write, b'x')\nprint('EFFECT')",
        "PermissionError",
    ),
    "killing another by its limits": (
        "import resource\nresource.prlimit(PID, resource.RLIMIT_CPU, (0, 0))\nprint('EFFECT')",
        "PermissionError",
    ),
    "its own limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nprint('EFFECT')",
        "PermissionError|ValueError",
    ),
    "priority": ("os.setpriority(os.PRIO_PROCESS, PID, 19)\nprint('EFFECT')", "PermissionError"),
    "cores of another": ("os.sched_setaffinity(PID, [0])\nprint('EFFECT')", "PermissionError"),
    "another user": ("os.setuid(12345)\nprint('EFFECT')", "PermissionError"),
    "a shell": (
        "os.system('touch FOLDER/new')\nos.execv('/bin/sh', ['sh', '-c', 'touch FOLDER/new'])",
        "PermissionError",
    ),
    "a subprocess": ("import subprocess\nsubprocess.run(['touch', 'FOLDER/new'])\nprint('EFFECT')", "PermissionError"),
    "a daemon": (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        open('FOLDER/new', 'w')\n        time.sleep(60)",
        "PermissionError",
    ),
    "a session of its own": ("os.setsid()\nprint('EFFECT')", "PermissionError"),
    # System calls without Python: (number, arguments) by name, on x86_64.
    "system calls": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "for call in (41, 56, 57, 58, 59, 62, 101, 129, 155, 161, 165, 200, 234, 248, 250, 272, 298, 303, 304, 308, 310,\n"
        "             311, 317, 319, 321, 322, 323, 424, 425, 426, 428, 434, 435, 437, 438, 440, 442, 447, 2**30 + 41):\n"
        "    ctypes.set_errno(0)\n    if libc.syscall(call, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1:\n"
        "        print('EFFECT', call)",
        "AssertionError",
    ),
    "tracing": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nif libc.ptrace(16, PID, 0, 0) == 0:\n    print('EFFECT')",
        "AssertionError",
    ),
    "32-bit system calls": (  # int 0x80 with number 20, getpid: another table of numbers, which no filter allows
        "import ctypes, mmap\nspace = mmap.mmap(-1, 4096, prot=7)\nspace.write(bytes.fromhex('b814000000cd80c3'))\n"
        "ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(space)))()\nprint('EFFECT')",
        "ended",
    ),
    "broken memory": ("import ctypes\nctypes.string_at(1)", "ended"),
    # Passing without being right.
    "leaving": ("os._exit(0)", "ended"),
    "leaving politely": ("sys.exit(0)", "SystemExit"),
    "closing everything": ("os.closerange(0, 1000)", "ended|Bad file|Broken"),
    "a verdict on the screen": ('print(\'{"passed": true, "reason": ""}\')\nos._exit(0)', "ended"),
    "a verdict to everyone": (
        'for fd in range(32):\n    try:\n        os.write(fd, b\'{"passed": true, "reason": ""}\\n\')\n'
        "    except OSError:\n        pass\nos._exit(0)",
        "",
    ),
    "a verdict at exit": (
        "import atexit\natexit.register(print, '{\"passed\": true}')\nraise SystemExit(0)",
        "SystemExit",
    ),
    "other built-ins": (
        "import builtins\nbuiltins.AssertionError = type('Never', (Exception,), {})\nbuiltins.all = lambda *_: True\n"
        "builtins.isinstance = lambda *_: True",
        "",
    ),
    "another encoder": (
        "import wire, json\nwire.encode = lambda *_: 'anything'\njson.dumps = lambda *_: '{\"passed\": true}'",
        "",
    ),
    "an object equal to all": (
        "class Same:\n    __eq__ = __ne__ = __lt__ = __bool__ = lambda *_: True\n    __hash__ = None\nreturn Same()",
        "plain data|real number",
    ),
    "a number equal to all": (
        "class Same(int):\n    __eq__ = __req__ = lambda *_: True\n    __hash__ = int.__hash__\nreturn Same(5)",
        "AssertionError",
    ),
    "a stand-in made up": (
        'for fd in range(3, 32):\n    try:\n        os.write(fd, b\'{"value": {"type": "object", "id": 0}}\\n\')\n'
        "    except OSError:\n        pass",
        "plain data|real number",
    ),
    "an answer that is no answer": (
        "for fd in range(3, 32):\n    try:\n        os.write(fd, b'\\xff\\x00 no JSON\\n')\n    except OSError:\n        pass",
        "Error",
    ),
    "looking for the tests": (
        "import gc\nframe = sys._getframe()\ntexts = []\nwhile frame:\n    texts.append(str(frame.f_locals))\n    frame = frame.f_back\n"
        "texts += [item for item in gc.get_objects() if isinstance(item, str)]\n"
        "for module in list(sys.modules.values()):\n    texts += [str(value) for value in vars(module).values()]\n"
        "print('EFFECT' if any('number_' + 'expected' in text for text in texts) else '')",
        "AssertionError",
    ),
    "an exception with a message of its own": (
        "class Odd(Exception):\n    def __str__(self):\n        os._exit(0)\nraise Odd",
        "ended",
    ),
    "an exception that ends tests": ("raise type('SystemExit', (BaseException,), {})()", "SystemExit"),
    "an exception that ends loops": ("raise StopIteration", "RuntimeError"),
    "warnings and hooks": (
        "sys.excepthook = sys.settrace = lambda *_: None\nsys.stdout = sys.stderr = None\nraise KeyboardInterrupt",
        "KeyboardInterrupt",
    ),
}

# name -> (whole program, pattern of the reason)
PROGRAMS: dict[str, tuple[str, str]] = {
    "an empty program": ("", "no attribute 'solve'"),
    "no program": ("def solve(number", "SyntaxError"),
    "null bytes": ("\0def solve(number): pass", "null bytes|SyntaxError"),
    "lone surrogates": ("x = '\ud800'\ndef solve(number): pass", "UnicodeEncodeError"),
    "nested source": ("solve = " + "(" * 10**5, "SyntaxError|MemoryError|ended"),
    "a long sum": ("solve = " + "-" * 10**6 + "1", "Error|ended"),
    "leaving at import": ("import os\nos._exit(0)", "ended|Broken pipe"),
    "its own check": (
        "def solve(number): pass\ndef check(candidate): pass\ndef candidate(number): return 2 * number",
        "",
    ),
    "its own math": (
        "class Maths:\n    isclose = staticmethod(lambda *_: True)\nmath = Maths()\ndef solve(number): return 0",
        "",
    ),
    "a generator that never ends": (
        "def solve(number):\n    while True:\n        yield number",
        "plain data|real number",
    ),
    "a number in place of a function": ("solve = 4", "not callable"),
}
