//! Every limit of the protocol in one place; decoding refuses what goes beyond, and allocates nothing before it has
//! looked. The numbers are libvirt's (9.0 to 11.3), so that no stock client is refused.

/// Longest message in bytes, with the length word and the header: 32 MiB.
pub const MESSAGE_MAX: usize = 33_554_432;
/// Bytes of the length word.
pub const LENGTH_SIZE: usize = 4;
/// Bytes of the header behind the length word.
pub const HEADER_SIZE: usize = 24;
/// Most file descriptors with one message.
pub const FDS_MAX: usize = 32;
/// Most bytes of raw data in one stream packet: 256 KiB less the header.
pub const STREAM_CHUNK_MAX: usize = 262_120;

/// Longest string in bytes: 4 MiB.
pub const STRING_MAX: usize = 4_194_304;
/// Most domains, networks, pools, volumes, snapshots, ... in one list.
pub const LIST_MAX: usize = 16_384;
/// Most node devices, or capabilities of one, in one list.
pub const NODE_DEVICE_LIST_MAX: usize = 65_536;
/// Most DHCP leases in one answer.
pub const NETWORK_DHCP_LEASES_MAX: usize = 65_536;
/// Most parameters of one domain in a bulk statistics answer.
pub const STATS_PARAMS_MAX: usize = 262_144;
/// Most parameters in a domain's CPU statistics.
pub const CPU_STATS_PARAMS_MAX: usize = 2_048;
/// Most parameters in a "tunable changed" event.
pub const TUNABLE_PARAMS_MAX: usize = 2_048;
/// Most parameters in what a guest agent tells.
pub const GUEST_INFO_PARAMS_MAX: usize = 2_048;
/// Most CPU model names in one answer.
pub const CPU_MODELS_MAX: usize = 8_192;
/// Most virtual CPUs or I/O threads in one answer.
pub const VCPU_INFO_MAX: usize = 16_384;
/// Longest CPU map in bytes.
pub const CPUMAP_MAX: usize = 2_048;
/// Longest block of several CPU maps in bytes: 8 MiB.
pub const CPUMAPS_MAX: usize = 8_388_608;
/// Longest migration cookie in bytes: 4 MiB.
pub const MIGRATE_COOKIE_MAX: usize = 4_194_304;
/// Most bytes a memory or block peek returns: 4 MiB.
pub const PEEK_MAX: usize = 4_194_304;
/// Longest value of a secret in bytes.
pub const SECRET_VALUE_MAX: usize = 65_536;
/// Longest SASL data in bytes.
pub const SASL_DATA_MAX: usize = 65_536;
/// Most authentication types a server names.
pub const AUTH_TYPES_MAX: usize = 20;
/// Most memory statistics of a domain.
pub const DOMAIN_MEMORY_STATS_MAX: usize = 1_024;
/// Most disks with errors in one answer.
pub const DOMAIN_DISK_ERRORS_MAX: usize = 256;
/// Most interfaces of a domain, and addresses of an interface, in one answer.
pub const DOMAIN_INTERFACE_MAX: usize = 2_048;
/// Most identities in a graphics event.
pub const GRAPHICS_IDENTITY_MAX: usize = 20;
/// Longest security label in bytes, with the final NUL.
pub const SECURITY_LABEL_MAX: usize = 4_097;
/// Most security labels of a domain.
pub const SECURITY_LABEL_LIST_MAX: usize = 64;
/// Longest name of a security model or its DOI in bytes, with the final NUL.
pub const SECURITY_MODEL_MAX: usize = 257;
