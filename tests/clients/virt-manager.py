"""virt-manager under Xvfb: lists a domain of the daemon at the URI given, starts it, uses its serial console, and
forces it off.

Run by tests/clients/virt-manager, in a D-Bus session and an X server of its own. Driven through AT-SPI, as a
screen reader would.
"""
import subprocess
import sys
import time

import gi

gi.require_version("Atspi", "2.0")
from gi.repository import Atspi  # noqa: E402
import libvirt  # noqa: E402

uri, name = sys.argv[1:3]
LIMIT = 120


def wait(what, look):
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        found = look()
        if found:
            return found
        time.sleep(0.3)
    subprocess.run(["import", "-window", "root", "virt-manager.png"], check=False)
    raise SystemExit(f"virt-manager: {what} did not come")


def nodes(node, depth=0):
    yield node
    if depth < 30:
        for at in range(min(node.get_child_count(), 200)):
            child = node.get_child_at_index(at)
            if child is not None:
                yield from nodes(child, depth + 1)


def application():
    desktop = Atspi.get_desktop(0)
    for at in range(desktop.get_child_count()):
        app = desktop.get_child_at_index(at)
        if app is not None and "virt-manager" in (app.get_name() or ""):
            return app
    return None


def find(role, text, showing=True):
    app = application()
    if app is None:
        return None
    try:
        for node in nodes(app):
            if node.get_role_name() == role and text in (node.get_name() or ""):
                if not showing or node.get_state_set().contains(Atspi.StateType.SHOWING):
                    return node
    except gi.repository.GLib.Error:
        pass
    return None


def usable(role, text):
    node = find(role, text)
    return node if node and node.get_state_set().contains(Atspi.StateType.SENSITIVE) else None


def key(name):
    subprocess.run(["xdotool", "key", name], check=True)


def press(node):
    Atspi.Action.do_action(node, 0)


def click(node):
    place = Atspi.Component.get_extents(node, Atspi.CoordType.SCREEN)
    at = [str(place.x + place.width // 2), str(place.y + place.height // 2)]
    subprocess.run(["xdotool", "mousemove", *at, "click", "1"], check=True)


conn = libvirt.open(uri)
dom = conn.lookupByName(name)
manager = subprocess.Popen(["virt-manager", "--no-fork", "--connect", uri])
try:
    row = wait("the domain in the list", lambda: find("table cell", name))
    print("listed:", (row.get_name() or "").replace("\n", " / "))

    def runnable():
        click(find("table cell", name) or row)
        time.sleep(1)
        return usable("push button", "Run")

    press(wait("the button to run it", runnable))
    wait("the running domain", dom.isActive)
    print("started")
    # Its window shows the serial console of a guest without graphics.
    press(wait("the button to open it", lambda: usable("push button", "Open")))
    wait("its window", lambda: find("frame", f"{name} on"))
    terminal = wait("the console", lambda: find("terminal", ""))

    def shown():
        count = Atspi.Text.get_character_count(terminal)
        return Atspi.Text.get_text(terminal, 0, count)

    # A key, in case the guest had nothing more to say when the console was opened.
    click(terminal)
    wait("the guest's prompt on the console", lambda: key("Return") or "/root# " in shown())
    subprocess.run(["xdotool", "type", "--delay", "80", "echo $((6 * 7))con\n"], check=True)
    wait("what the guest's shell answers", lambda: "42con" in shown())
    print("typed into the serial console")
    # Items of menus that are not open can be chosen as well. It does not ask whether to (the script's setting): the
    # question would not be seen from here as long as the menu's item waits for the answer.
    press(wait("the item to force it off", lambda: find("menu item", "Force Off", False)))
    wait("the stopped domain", lambda: not dom.isActive())
    print("stopped")
finally:
    manager.terminate()
    manager.wait(20)
