//! What goes over the wire, byte by byte.

use rpc::args::*;
use rpc::error::{ErrorCode, ErrorDomain, RemoteError};
use rpc::frame::{Frame, FrameDecoder, FrameError, Header, MessageType, Status};
use rpc::limits::{LIST_MAX, MESSAGE_MAX, STRING_MAX};
use rpc::procs;
use rpc::types::{Domain, TypedParam, TypedValue};
use rpc::xdr::{CharArray, CharList, List, Opaque, XdrError, from_bytes, to_bytes};

/// The first bytes that any libvirt client sends.
const AUTH_LIST: [u8; 28] = [
    0, 0, 0, 0x1c, 0x20, 0, 0x80, 0x86, 0, 0, 0, 1, 0, 0, 0, 0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0,
];

#[test]
fn the_first_call_is_the_one_that_stock_clients_send() {
    let frame = Frame::new(Header::call(procs::AUTH_LIST, 0), &()).unwrap();
    assert_eq!(frame.to_wire().unwrap(), AUTH_LIST);
}

#[test]
fn strings_are_padded_and_checked() {
    assert_eq!(
        to_bytes("abcde").unwrap(),
        [0, 0, 0, 5, b'a', b'b', b'c', b'd', b'e', 0, 0, 0]
    );
    assert_eq!(
        from_bytes::<String>(&[0, 0, 0, 1, b'a', 0, 0, 0]).unwrap(),
        "a"
    );
    assert_eq!(
        from_bytes::<String>(&[0, 0, 0, 1, 0xff, 0, 0, 0]),
        Err(XdrError::NotUtf8)
    );
    assert_eq!(
        from_bytes::<String>(&[0, 0, 0, 1, 0, 0, 0, 0]),
        Err(XdrError::NulInString)
    );
    assert_eq!(
        from_bytes::<String>(&[0, 0, 0, 2, b'a']),
        Err(XdrError::Truncated { need: 4, left: 1 })
    );
    let long = [0x7f, 0xff, 0xff, 0xff, b'a', 0, 0, 0];
    assert_eq!(
        from_bytes::<String>(&long),
        Err(XdrError::TooLong {
            len: 0x7fff_ffff,
            max: STRING_MAX
        })
    );
    assert_eq!(
        from_bytes::<String>(&[0, 0, 0, 0, 1, 2, 3, 4]),
        Err(XdrError::Trailing(4))
    );
    assert_eq!(to_bytes("a\0b"), Err(XdrError::NulInString));
}

#[test]
fn lists_end_at_their_limit() {
    let list: List<u32, 2> = vec![1, 2, 3].into();
    assert_eq!(to_bytes(&list), Err(XdrError::TooLong { len: 3, max: 2 }));
    let full: List<u32, LIST_MAX> = vec![7; LIST_MAX].into();
    assert_eq!(
        from_bytes::<List<u32, LIST_MAX>>(&to_bytes(&full).unwrap()).unwrap(),
        full
    );
    // A count within the limit without the items behind it costs nothing.
    assert_eq!(
        from_bytes::<List<String, LIST_MAX>>(&[0, 0, 0x40, 0]),
        Err(XdrError::Truncated { need: 4, left: 0 })
    );
}

#[test]
fn c_chars_take_a_word_each() {
    let info = NodeGetInfoRet {
        model: CharArray::from_text("x86_64"),
        memory: 1,
        ..Default::default()
    };
    let bytes = to_bytes(&info).unwrap();
    assert_eq!(bytes.len(), 32 * 4 + 8 + 6 * 4);
    assert_eq!(&bytes[..8], [0, 0, 0, b'x', 0, 0, 0, b'8']);
    assert_eq!(
        from_bytes::<NodeGetInfoRet>(&bytes).unwrap().model.text(),
        "x86_64"
    );
    let label: CharList<4> = CharList::from_text("äöü");
    assert_eq!(label.text(), "ä");
    let opaque: Opaque<8> = vec![1, 2, 3].into();
    assert_eq!(to_bytes(&opaque).unwrap(), [0, 0, 0, 3, 1, 2, 3, 0]);
}

#[test]
fn references_and_parameters_look_as_documented() {
    let dom = Domain::new("t1", [0xab; 16], None);
    let mut expected = vec![0, 0, 0, 2, b't', b'1', 0, 0];
    expected.extend([0xab; 16]);
    expected.extend([0xff; 4]);
    assert_eq!(to_bytes(&dom).unwrap(), expected);
    assert_eq!(from_bytes::<Domain>(&expected).unwrap(), dom);
    assert_eq!(dom.active_id(), None);

    for (value, number) in [
        (TypedValue::Int(-1), 1),
        (TypedValue::UInt(1), 2),
        (TypedValue::LLong(-1), 3),
        (TypedValue::ULLong(1), 4),
        (TypedValue::Double(0.5), 5),
        (TypedValue::Boolean(true), 6),
        (TypedValue::String("x".into()), 7),
    ] {
        let param = TypedParam::new("f", value);
        let bytes = to_bytes(&param).unwrap();
        assert_eq!(bytes[8..12], [0, 0, 0, number]);
        assert_eq!(from_bytes::<TypedParam>(&bytes).unwrap(), param);
    }
    assert_eq!(
        from_bytes::<TypedValue>(&[0, 0, 0, 8, 0, 0, 0, 0]),
        Err(XdrError::BadType(8))
    );
    assert_eq!(
        from_bytes::<Option<u32>>(&[0, 0, 0, 2, 0, 0, 0, 0]),
        Err(XdrError::BadOptional(2))
    );
}

#[test]
fn errors_carry_libvirts_words_and_survive_the_wire() {
    let error = RemoteError::unknown_procedure(426);
    assert_eq!(error.message(), "unknown procedure: 426");
    assert_eq!(
        (error.code, error.domain, error.level),
        (ErrorCode::RPC, ErrorDomain::RPC, 2)
    );
    assert_eq!(
        from_bytes::<RemoteError>(&to_bytes(&error).unwrap()).unwrap(),
        error
    );
    assert_eq!(error.for_client().code, ErrorCode::NO_SUPPORT);

    let error = RemoteError::new(
        ErrorCode::OPERATION_INVALID,
        ErrorDomain::QEMU,
        "domain is not running",
    )
    .about(Domain::new("x", [0; 16], Some(1)));
    assert_eq!(
        error.message(),
        "Requested operation is not valid: domain is not running"
    );
    assert_eq!(
        from_bytes::<RemoteError>(&to_bytes(&error).unwrap()).unwrap(),
        error
    );

    // Whatever a message was made from, it can be sent.
    let error = RemoteError::new(
        ErrorCode::XML_ERROR,
        ErrorDomain::XML,
        format!("a\0b{}", "ß".repeat(3_000_000)),
    );
    assert!(to_bytes(&error).unwrap().len() < MESSAGE_MAX);
}

/// Feeds a decoder in portions and returns what came out.
fn feed(mut bytes: &[u8], portion: usize) -> Result<Vec<Frame>, FrameError> {
    let mut decoder = FrameDecoder::new();
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let wanted = decoder.wanted();
        assert!(wanted > 0);
        let (now, later) = bytes.split_at(wanted.min(portion).min(bytes.len()));
        bytes = later;
        frames.extend(decoder.feed(now)?.map(|decoded| decoded.frame));
    }
    Ok(frames)
}

#[test]
fn messages_come_together_from_any_portions() {
    let args = DomainLookupByNameArgs {
        name: "a domain".into(),
    };
    let first = Frame::new(Header::call(procs::DOMAIN_LOOKUP_BY_NAME, 5), &args).unwrap();
    let stream = Header {
        kind: MessageType::Stream,
        status: Status::Continue,
        ..first.header
    };
    let second = Frame::raw(stream, vec![9; 100_001]);
    let mut bytes = first.to_wire().unwrap();
    bytes.extend(second.to_wire().unwrap());
    bytes.extend(AUTH_LIST);
    for portion in [1, 2, 3, 5, 27, 28, 29, 1000, usize::MAX] {
        let frames = feed(&bytes, portion).unwrap();
        assert_eq!(frames.len(), 3);
        assert_eq!(frames[0].header, first.header);
        assert_eq!(frames[0].payload, first.payload);
        assert_eq!(frames[1].payload.len(), 100_001);
        assert_eq!(frames[2].header, Header::call(procs::AUTH_LIST, 0));
    }
    // Cut anywhere, the whole ones come out and nothing else.
    for cut in 0..first.wire_len() + 40 {
        let frames = feed(&bytes[..cut], usize::MAX).unwrap();
        assert_eq!(
            frames.len(),
            usize::from(cut >= first.wire_len()),
            "cut at {cut}"
        );
    }
}

#[test]
fn impossible_lengths_are_refused_at_once() {
    for len in [0u32, 4, 27] {
        let result = feed(&len.to_be_bytes(), usize::MAX);
        assert_eq!(
            result.unwrap_err(),
            FrameError::TooSmall { len: len as usize }
        );
    }
    let mut bytes = AUTH_LIST;
    bytes[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    let header = Header::call(procs::AUTH_LIST, 0);
    let expected = FrameError::TooLarge {
        len: u32::MAX as usize,
        header: Some(header),
    };
    assert_eq!(feed(&bytes, 1).unwrap_err(), expected);

    let mut header = header;
    header.kind = MessageType::CallWithFds;
    let mut bytes = Frame::raw(header, Vec::new()).to_wire().unwrap();
    bytes[28..].copy_from_slice(&33u32.to_be_bytes());
    assert_eq!(
        feed(&bytes, usize::MAX).unwrap_err(),
        FrameError::TooManyFds { count: 33 }
    );
    // A message with descriptors that has no room for their count.
    let mut bytes = AUTH_LIST;
    bytes[19] = 4;
    assert!(matches!(feed(&bytes, usize::MAX), Err(FrameError::Xdr(_))));
}

#[test]
fn a_header_of_any_numbers_is_carried_unchanged() {
    for number in [-1, 3, 7, i32::MAX, i32::MIN] {
        let header = Header {
            program: 1,
            version: 2,
            procedure: number,
            kind: number.into(),
            serial: u32::MAX,
            status: number.into(),
        };
        assert_eq!(
            from_bytes::<Header>(&to_bytes(&header).unwrap()).unwrap(),
            header
        );
    }
}

#[test]
fn documents_in_latin_1_arrive_as_text() {
    let sent = |bytes: &[u8]| {
        let mut wire = u32::try_from(bytes.len()).unwrap().to_be_bytes().to_vec();
        wire.extend_from_slice(bytes);
        wire.resize(wire.len().next_multiple_of(4), 0);
        from_bytes::<String>(&wire)
    };
    let text = sent(b"<?xml version='1.0' encoding='ISO-8859-1'?><name>caf\xe9</name>").unwrap();
    assert_eq!(
        text,
        "<?xml version='1.0' encoding='UTF-8'?><name>caf\u{e9}</name>"
    );
    let text = sent(b"<?xml version=\"1.0\" encoding = \"latin1\" standalone='yes'?>\xff").unwrap();
    assert_eq!(
        text,
        "<?xml version=\"1.0\" encoding=\"UTF-8\" standalone='yes'?>\u{ff}"
    );
    for other in [
        &b"caf\xe9"[..],
        b"<?xml version='1.0'?>\xe9",
        b"<?xml encoding='ISO-8859-5'?>\xe9",
        b"<?xml encoding='ISO-8859-1'>\xe9",
        b"<?xml encoding=\xe9?>",
        b"<?xml encoding=?>\xe9",
    ] {
        assert!(matches!(sent(other), Err(XdrError::NotUtf8)), "{other:?}");
    }
}

#[test]
fn documents_in_utf16() {
    use rpc::xdr::utf16_document;
    let text = "<?xml version='1.0' encoding='UTF-16'?>\n<a>\u{fc}\u{1f600}</a>\n";
    let wanted = text.replace("UTF-16", "UTF-8");
    for (mark, bytes) in [
        ([0xff, 0xfe], u16::to_le_bytes as fn(u16) -> [u8; 2]),
        ([0xfe, 0xff], u16::to_be_bytes),
    ] {
        let mut file = mark.to_vec();
        file.extend(text.encode_utf16().flat_map(bytes));
        assert_eq!(utf16_document(&file), Some(wanted.clone()));
        // Half a character, nothing, and half a pair.
        assert_eq!(utf16_document(&file[..file.len() - 1]), None);
        file.truncate(2);
        assert_eq!(utf16_document(&file), Some(String::new()));
        file.extend(bytes(0xd83d));
        assert_eq!(utf16_document(&file), None);
    }
    assert_eq!(utf16_document(b"<a/>"), None);
    assert_eq!(utf16_document(&[0xff]), None);
}
