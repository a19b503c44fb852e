//! libvirt XML documents: parse, validate, default, format.
