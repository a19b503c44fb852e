# virDomainBlockRebase, which no command calls for a copy: URI DOMAIN DISK BASE FLAGS BANDWIDTH.
import ctypes
import sys

uri, domain, disk, base, flags, bandwidth = sys.argv[1:]
lib = ctypes.CDLL("libvirt.so.0")
for name in ("virConnectOpen", "virDomainLookupByName"):
    getattr(lib, name).restype = ctypes.c_void_p
lib.virDomainLookupByName.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
lib.virDomainBlockRebase.argtypes = [
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_uint
]
lib.virGetLastErrorMessage.restype = ctypes.c_char_p
silent = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(lambda *_: None)
lib.virSetErrorFunc(None, silent)
connection = lib.virConnectOpen(uri.encode())
found = lib.virDomainLookupByName(connection, domain.encode())
lib.virDomainBlockRebase(found, disk.encode(), base.encode(), int(bandwidth), int(flags))
print(lib.virGetLastErrorCode(), lib.virGetLastErrorMessage().decode())
