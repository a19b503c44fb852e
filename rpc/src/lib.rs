//! libvirt wire protocol: XDR, frames, procedure tables, client and server.
