"""A disk that no longer confirms anything: from the call on, every fsync of this process fails with EIO.

By a seccomp filter over all threads of the process, so that SQLite's own calls fail as the kernel would
fail them. Needs no privilege and cannot be undone: for processes that end soon. x86-64 Linux.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_FSYNC, _FDATASYNC, _SECCOMP = 74, 75, 317
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _ALL_THREADS = 1, 1
_LOAD_NUMBER, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def fail_every_fsync() -> None:
    """Raises OSError if the kernel takes no filter."""
    instructions = (
        (_LOAD_NUMBER, 0, 0, 0),
        (_JUMP_IF_EQUAL, 2, 0, _FSYNC),
        (_JUMP_IF_EQUAL, 1, 0, _FDATASYNC),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _FAIL | errno.EIO),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in instructions))
    program = _Program(len(instructions), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for result in (
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        libc.syscall(_SECCOMP, _SET_MODE_FILTER, _ALL_THREADS, ctypes.byref(program)),
    ):
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
