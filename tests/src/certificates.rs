//! Certificates for TLS between a test's own programs.

use std::fs;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};

/// Makes a CA, a server's and a client's certificate, the server's for these names: as libvirt's `pkipath` wants them,
/// and as QEMU's folders of certificates do.
pub fn certificates(folder: &Path, names: &[&str]) {
    fs::create_dir_all(folder).unwrap();
    let params = |name: &str, names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params
    };
    let mut ca = params("a test's CA", &[]);
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let write = |what: &str, kind: &str, text: String| {
        fs::write(folder.join(format!("{what}{kind}.pem")), &text).unwrap();
        fs::write(folder.join(format!("{what}-{kind}.pem")), text).unwrap();
    };
    write("ca", "cert", ca.pem());
    for (name, names, usage) in [
        ("server", names, ExtendedKeyUsagePurpose::ServerAuth),
        ("client", &[][..], ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let mut params = params(name, names);
        params.extended_key_usages = vec![usage];
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &ca).unwrap();
        write(name, "cert", certificate.pem());
        write(name, "key", key.serialize_pem());
    }
}
