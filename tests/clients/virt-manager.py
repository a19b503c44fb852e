"""virt-manager under Xvfb: lists a domain of the daemon at the URI given, starts it and forces it off.

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
        button = find("push button", "Run")
        usable = button and button.get_state_set().contains(Atspi.StateType.SENSITIVE)
        return button if usable else None

    press(wait("the button to run it", runnable))
    wait("the running domain", dom.isActive)
    print("started")
    arrow = wait("the menu of ways to stop it", lambda: find("toggle button", ""))
    click(arrow)
    click(wait("the item to force it off", lambda: find("menu item", "Force Off")))
    click(wait("the question whether to", lambda: find("push button", "Yes")))
    wait("the stopped domain", lambda: not dom.isActive())
    print("stopped")
finally:
    manager.terminate()
    manager.wait(20)
