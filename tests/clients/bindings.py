"""python3-libvirt on the daemon whose URI is the first argument: domains, events, streams, secrets.

The second argument is a domain's XML; it boots a guest that says TINY and then echoes its console.
"""
import sys
import tempfile
import threading
import time

import libvirt

uri, xml = sys.argv[1], open(sys.argv[2], encoding="utf-8").read()
errors = []
libvirt.registerErrorHandler(lambda _, error: errors.append(error), None)
libvirt.virEventRegisterDefaultImpl()


def loop():
    while True:
        libvirt.virEventRunDefaultImpl()


threading.Thread(target=loop, daemon=True).start()
conn = libvirt.open(uri)
conn.setKeepAlive(5, 3)
assert conn.isAlive() and conn.isSecure()
assert conn.getType() == "QEMU", conn.getType()
assert conn.getLibVersion() == libvirt.getVersion(), (conn.getLibVersion(), libvirt.getVersion())
assert "<capabilities>" in conn.getCapabilities()
assert conn.getInfo()[0] == "x86_64"
assert conn.listAllDomains() == []

heard = []
changed = threading.Condition()


def tell(*what):
    with changed:
        heard.append(what)
        changed.notify_all()


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    with changed:
        while what not in heard:
            left = end - time.monotonic()
            assert left > 0, f"{what} did not come; {heard} did"
            changed.wait(left)


E = libvirt
callbacks = [
    conn.domainEventRegisterAny(
        None, E.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
        lambda c, d, event, detail, o: tell("life", d.name(), event), None),
    conn.domainEventRegisterAny(
        None, E.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE,
        lambda c, d, kind, uri, o: tell("metadata", d.name(), kind, uri), None),
    conn.domainEventRegisterAny(
        None, E.VIR_DOMAIN_EVENT_ID_REBOOT, lambda c, d, o: tell("reboot", d.name()), None),
]
secret_callbacks = [
    conn.secretEventRegisterAny(
        None, E.VIR_SECRET_EVENT_ID_LIFECYCLE,
        lambda c, s, event, detail, o: tell("secret", s.UUIDString(), event), None),
    conn.secretEventRegisterAny(
        None, E.VIR_SECRET_EVENT_ID_VALUE_CHANGED,
        lambda c, s, o: tell("value", s.UUIDString()), None),
]
others = [
    (conn.networkEventDeregisterAny,
     conn.networkEventRegisterAny(None, E.VIR_NETWORK_EVENT_ID_LIFECYCLE, lambda *a: None, None)),
    (conn.storagePoolEventDeregisterAny,
     conn.storagePoolEventRegisterAny(None, E.VIR_STORAGE_POOL_EVENT_ID_LIFECYCLE, lambda *a: None, None)),
    (conn.storagePoolEventDeregisterAny,
     conn.storagePoolEventRegisterAny(None, E.VIR_STORAGE_POOL_EVENT_ID_REFRESH, lambda *a: None, None)),
    (conn.nodeDeviceEventDeregisterAny,
     conn.nodeDeviceEventRegisterAny(None, E.VIR_NODE_DEVICE_EVENT_ID_LIFECYCLE, lambda *a: None, None)),
]

# A domain's life.
dom = conn.defineXML(xml)
name = dom.name()
wait_for(("life", name, E.VIR_DOMAIN_EVENT_DEFINED))
assert dom.isPersistent() and not dom.isActive() and dom.ID() == -1
assert conn.lookupByUUIDString(dom.UUIDString()).name() == name
dom.setMetadata(E.VIR_DOMAIN_METADATA_DESCRIPTION, "from python", None, None, 0)
wait_for(("metadata", name, E.VIR_DOMAIN_METADATA_DESCRIPTION, None))
assert dom.metadata(E.VIR_DOMAIN_METADATA_DESCRIPTION, None) == "from python"
dom.setAutostart(1)
assert dom.autostart() == 1
dom.createWithFlags(E.VIR_DOMAIN_START_PAUSED)
assert dom.state() == [E.VIR_DOMAIN_PAUSED, E.VIR_DOMAIN_PAUSED_USER]

# Its console, opened before it says anything.
stream = conn.newStream(0)
dom.openConsole(None, stream, 0)
dom.resume()
wait_for(("life", name, E.VIR_DOMAIN_EVENT_RESUMED))
said = b""
while b"TINY" not in said:
    got = stream.recv(4096)
    assert got, said
    said += got
stream.send(b"echo me\n")
said = b""
while b"echo me" not in said:
    said += stream.recv(4096)
stream.finish()

assert dom.info()[0] == E.VIR_DOMAIN_RUNNING and dom.maxVcpus() >= 1
# The kernel's code, where it was loaded; it has no paging, so both kinds of address are the same.
code = dom.memoryPeek(1 << 20, 300, E.VIR_MEMORY_PHYSICAL)
assert len(code) == 300 and all(letter in code for letter in b"TINY"), code
assert dom.memoryPeek(1 << 20, 300, E.VIR_MEMORY_VIRTUAL) == code
whole = dom.memoryPeek(0, 300_000, E.VIR_MEMORY_PHYSICAL)
assert len(whole) == 300_000
for start, flags, code in ((1 << 40, E.VIR_MEMORY_PHYSICAL, E.VIR_ERR_OPERATION_FAILED), (0, 0, E.VIR_ERR_INVALID_ARG)):
    try:
        dom.memoryPeek(start, 8, flags)
        raise SystemExit("memory was read")
    except libvirt.libvirtError as error:
        assert error.get_error_code() == code, error
stats = conn.getAllDomainStats(E.VIR_DOMAIN_STATS_STATE)
assert [(d.name(), s["state.state"]) for d, s in stats] == [(name, E.VIR_DOMAIN_RUNNING)], stats
dom.suspend()
wait_for(("life", name, E.VIR_DOMAIN_EVENT_SUSPENDED))
dom.destroy()
wait_for(("life", name, E.VIR_DOMAIN_EVENT_STOPPED))
with tempfile.NamedTemporaryFile() as image:
    image.write(b"a peek" + b"\1" * 1000)
    image.flush()
    disk = "<disk type='file'><driver type='%s'/><source file='" + image.name + "'/><target dev='%s'/></disk>"
    dom.attachDeviceFlags(disk % ("raw", "vda"), E.VIR_DOMAIN_AFFECT_CONFIG)
    dom.attachDeviceFlags(disk % ("qcow2", "vdb"), E.VIR_DOMAIN_AFFECT_CONFIG)
    assert dom.blockPeek("vda", 2, 5) == b"peek\1"
    for disk, size, code in (("vdb", 5, E.VIR_ERR_OPERATION_UNSUPPORTED), ("vdc", 5, E.VIR_ERR_INVALID_ARG)):
        try:
            dom.blockPeek(disk, 0, size)
            raise SystemExit(disk + " was read")
        except libvirt.libvirtError as error:
            assert error.get_error_code() == code, error
dom.undefine()
wait_for(("life", name, E.VIR_DOMAIN_EVENT_UNDEFINED))
# Whether the guest's end is told before its stop depends on how it takes it.
order = [event[2] for event in heard if event[0] == "life" and event[2] != E.VIR_DOMAIN_EVENT_SHUTDOWN]
assert order == [
    E.VIR_DOMAIN_EVENT_DEFINED, E.VIR_DOMAIN_EVENT_STARTED, E.VIR_DOMAIN_EVENT_SUSPENDED,
    E.VIR_DOMAIN_EVENT_RESUMED, E.VIR_DOMAIN_EVENT_SUSPENDED, E.VIR_DOMAIN_EVENT_STOPPED,
    E.VIR_DOMAIN_EVENT_UNDEFINED], order

# Secrets.
secret = conn.secretDefineXML("<secret><usage type='volume'><volume>/x</volume></usage></secret>")
wait_for(("secret", secret.UUIDString(), E.VIR_SECRET_EVENT_DEFINED))
secret.setValue(b"\0\1\2")
wait_for(("value", secret.UUIDString()))
assert secret.value() == b"\0\1\2"
secret.undefine()
wait_for(("secret", secret.UUIDString(), E.VIR_SECRET_EVENT_UNDEFINED))

# Errors have libvirt's codes.
try:
    conn.lookupByName("nobody")
    raise SystemExit("nobody is there")
except libvirt.libvirtError as error:
    assert error.get_error_code() == E.VIR_ERR_NO_DOMAIN, error
    assert error.get_error_domain() == E.VIR_FROM_QEMU, error

for callback in callbacks:
    conn.domainEventDeregisterAny(callback)
for callback in secret_callbacks:
    conn.secretEventDeregisterAny(callback)
for deregister, callback in others:
    deregister(callback)
looker = libvirt.openReadOnly(uri)
try:
    looker.defineXML(xml)
    raise SystemExit("a read-only connection defined a domain")
except libvirt.libvirtError as error:
    assert error.get_error_code() == E.VIR_ERR_OPERATION_DENIED, error
looker.close()
conn.close()
print("all is well")
