//! Telnet (RFC 854) as a console needs it: binary, character at a time, the guest echoes.

const IAC: u8 = 255;
const DONT: u8 = 254;
const DO: u8 = 253;
const WONT: u8 = 252;
const WILL: u8 = 251;
const SB: u8 = 250;
const SE: u8 = 240;

const BINARY: u8 = 0;
const ECHO: u8 = 1;
const SUPPRESS_GO_AHEAD: u8 = 3;

/// Sent to every new peer.
pub const GREETING: [u8; 12] = [
    IAC,
    WILL,
    ECHO,
    IAC,
    WILL,
    SUPPRESS_GO_AHEAD,
    IAC,
    WILL,
    BINARY,
    IAC,
    DO,
    BINARY,
];

/// Strips commands from what a peer sends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Decoder {
    /// Between commands.
    #[default]
    Data,
    /// After IAC.
    Command,
    /// After WILL, WONT, DO or DONT: the option follows.
    Option(u8),
    /// In a subnegotiation.
    Sub,
    /// After IAC in a subnegotiation.
    SubCommand,
}

impl Decoder {
    /// Passes the data in `input` to `data`, and what must be answered to `reply`.
    pub fn decode(&mut self, input: &[u8], data: &mut Vec<u8>, reply: &mut Vec<u8>) {
        for &byte in input {
            *self = match (*self, byte) {
                (Self::Data, IAC) => Self::Command,
                (Self::Data, _) => {
                    data.push(byte);
                    Self::Data
                }
                (Self::Command, IAC) => {
                    data.push(IAC);
                    Self::Data
                }
                (Self::Command, WILL | WONT | DO | DONT) => Self::Option(byte),
                (Self::Command, SB) => Self::Sub,
                (Self::Command, _) => Self::Data,
                (Self::Option(verb), option) => {
                    // What was not in the greeting is refused; an answer to it needs none.
                    match (verb, option) {
                        (DO, BINARY | ECHO | SUPPRESS_GO_AHEAD) | (WILL, BINARY) => {}
                        (WILL, SUPPRESS_GO_AHEAD) => reply.extend([IAC, DO, option]),
                        (DO, _) => reply.extend([IAC, WONT, option]),
                        (WILL, _) => reply.extend([IAC, DONT, option]),
                        _ => {}
                    }
                    Self::Data
                }
                (Self::Sub, IAC) => Self::SubCommand,
                (Self::SubCommand, SE) => Self::Data,
                (Self::Sub | Self::SubCommand, _) => Self::Sub,
            };
        }
    }
}

/// Escapes output: a data byte 255 is sent twice.
pub fn encode(output: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(output.len());
    for &byte in output {
        bytes.push(byte);
        if byte == IAC {
            bytes.push(IAC);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(input: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let (mut data, mut reply) = (Vec::new(), Vec::new());
        let mut decoder = Decoder::default();
        // Byte by byte: commands may be cut anywhere.
        for byte in input {
            decoder.decode(&[*byte], &mut data, &mut reply);
        }
        (data, reply)
    }

    #[test]
    fn strips_commands() {
        assert_eq!(
            decode(&[
                b'a', IAC, 241, b'b', IAC, IAC, IAC, SB, 24, 0, IAC, SE, b'c'
            ])
            .0,
            [b'a', b'b', IAC, b'c']
        );
    }

    #[test]
    fn refuses_options_it_does_not_have() {
        assert_eq!(
            decode(&[IAC, DO, ECHO, IAC, WILL, 31, IAC, DO, 24]).1,
            [IAC, DONT, 31, IAC, WONT, 24]
        );
    }

    #[test]
    fn escapes() {
        assert_eq!(encode(&[1, IAC, 2]), [1, IAC, IAC, 2]);
    }
}
