//! Our client against our server, and raw bytes against it.

mod common;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::router;
use rpc::args::*;
use rpc::client::{Client, ClientConfig, ClientError};
use rpc::error::{ErrorCode, ErrorDomain, RemoteError};
use rpc::frame::{Frame, FrameDecoder, Header, MessageType, Status};
use rpc::procs;
use rpc::server::{Call, Keepalive, Router, Server, ServerConfig, SocketAccess};
use rpc::stream::{Stream, StreamError, StreamEvent};
use rpc::transport::Transport;
use rpc::types::Domain;
use rpc::xdr::from_bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Nothing here takes longer; what does hangs.
#[track_caller]
fn soon<T>(future: impl Future<Output = T>) -> impl Future<Output = T> {
    let caller = std::panic::Location::caller();
    async move {
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, future)
            .await
            .unwrap_or_else(|_| panic!("this hangs: {caller}"))
    }
}

fn connect(server: &Server, access: SocketAccess) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = server.clone();
    tokio::spawn(async move { server.serve(Transport::unix(theirs).unwrap(), access).await });
    ours
}

fn test_server() -> Server {
    Server::new(router().0, ServerConfig::default())
}

async fn client(server: &Server) -> Client {
    let client = Client::new(
        Transport::unix(connect(server, SocketAccess::ReadWrite)).unwrap(),
        ClientConfig::default(),
    );
    soon(client.open(Some("vireo:///system"), false))
        .await
        .unwrap();
    client
}

fn by_name(name: &str) -> DomainLookupByNameArgs {
    DomainLookupByNameArgs { name: name.into() }
}

fn running() -> Domain {
    Domain::new("running", [0x11; 16], Some(7))
}

#[tokio::test]
async fn calls_are_answered_and_errors_arrive_whole() {
    let server = test_server();
    let client = client(&server).await;
    let dom = soon(client.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("running")))
        .await
        .unwrap()
        .dom;
    assert_eq!(dom, running());

    let error = soon(client.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("x")))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NO_DOMAIN));
    assert_eq!(
        error.to_string(),
        "Domain not found: no domain with matching name 'x'"
    );

    let error = soon(client.call(procs::DOMAIN_CREATE, &DomainCreateArgs { dom: dom.clone() }))
        .await
        .unwrap_err();
    assert_eq!(error.remote().unwrap().dom, Some(dom));

    let error = soon(client.call(procs::CONNECT_GET_CAPABILITIES, &()))
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "unknown procedure: 7");
    assert_eq!(error.code(), Some(ErrorCode::NO_SUPPORT));

    soon(client.close()).await.unwrap();
}

#[tokio::test]
async fn many_calls_at_once_find_their_answers() {
    let server = test_server();
    let client = client(&server).await;
    let calls: Vec<_> = (0..200)
        .map(|number| {
            let client = client.clone();
            tokio::spawn(async move {
                let name = if number % 2 == 0 { "running" } else { "idle" };
                let found = client
                    .call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name(name))
                    .await
                    .unwrap();
                assert_eq!(found.dom.name, name);
            })
        })
        .collect();
    for call in calls {
        soon(call).await.unwrap();
    }
}

#[tokio::test]
async fn a_call_that_waits_holds_no_other_up_and_a_panic_is_one_failed_call() {
    let (router, _) = router();
    let router = router
        .on(procs::DOMAIN_SHUTDOWN, |_, _: DomainShutdownArgs| {
            std::future::pending()
        })
        .on(procs::DOMAIN_SUSPEND, |_, _: DomainSuspendArgs| async {
            panic!("on purpose")
        });
    let server = Server::new(router, ServerConfig::default());
    let client = client(&server).await;
    let waiting = {
        let client = client.clone();
        tokio::spawn(async move {
            client
                .call(
                    procs::DOMAIN_SHUTDOWN,
                    &DomainShutdownArgs { dom: running() },
                )
                .await
        })
    };
    let error = soon(client.call(procs::DOMAIN_SUSPEND, &DomainSuspendArgs { dom: running() }))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::INTERNAL_ERROR));
    soon(client.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("idle")))
        .await
        .unwrap();
    // With the server gone, who waits is told.
    server.shutdown();
    assert!(matches!(
        soon(waiting).await.unwrap(),
        Err(ClientError::Disconnected(_))
    ));
}

#[tokio::test]
async fn large_calls_of_one_client_take_more_of_its_places() {
    let counted = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
    let counts = Arc::clone(&counted);
    let (router, _) = router();
    let router = router.on(
        procs::DOMAIN_DEFINE_XML,
        move |_, _: DomainDefineXmlArgs| {
            let counts = Arc::clone(&counts);
            async move {
                let now = counts[0].fetch_add(1, Ordering::SeqCst) + 1;
                counts[1].fetch_max(now, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(50)).await;
                counts[0].fetch_sub(1, Ordering::SeqCst);
                Ok(DomainDefineXmlRet { dom: running() })
            }
        },
    );
    let config = ServerConfig {
        max_client_requests: 4,
        ..ServerConfig::default()
    };
    let client = client(&Server::new(router, config)).await;
    for (length, most) in [(3 << 20, 2), (1000, 4)] {
        counted[1].store(0, Ordering::SeqCst);
        let call = |_| {
            let client = client.clone();
            let xml = "x".repeat(length);
            tokio::spawn(async move {
                let args = DomainDefineXmlArgs { xml };
                client.call(procs::DOMAIN_DEFINE_XML, &args).await
            })
        };
        let calls: Vec<_> = (0..6).map(call).collect();
        for call in calls {
            soon(call).await.unwrap().unwrap();
        }
        assert!(counted[1].load(Ordering::SeqCst) <= most, "{length}");
    }
}

#[tokio::test]
async fn a_read_only_connection_touches_nothing() {
    let server = test_server();
    let by_socket = Client::new(
        Transport::unix(connect(&server, SocketAccess::ReadOnly)).unwrap(),
        ClientConfig::default(),
    );
    soon(by_socket.open(None, false)).await.unwrap();
    let by_wish = Client::new(
        Transport::unix(connect(&server, SocketAccess::ReadWrite)).unwrap(),
        ClientConfig::default(),
    );
    soon(by_wish.open(None, true)).await.unwrap();
    for client in [by_socket, by_wish] {
        soon(client.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("idle")))
            .await
            .unwrap();
        let create = DomainCreateArgs { dom: running() };
        let error = soon(client.call(procs::DOMAIN_CREATE, &create))
            .await
            .unwrap_err();
        assert_eq!(error.code(), Some(ErrorCode::OPERATION_DENIED));
        assert_eq!(error.remote().unwrap().domain, ErrorDomain::DOMAIN);
        assert_eq!(
            error.to_string(),
            "operation forbidden: read only access prevents virDomainCreate"
        );
        // Definitions yes, but not with their secrets.
        for (flags, code) in [(0, ErrorCode::NO_SUPPORT), (1, ErrorCode::OPERATION_DENIED)] {
            let args = DomainGetXmlDescArgs {
                dom: running(),
                flags,
            };
            let error = soon(client.call(procs::DOMAIN_GET_XML_DESC, &args))
                .await
                .unwrap_err();
            assert_eq!(error.code(), Some(code));
        }
    }
}

/// Reads one message from a raw connection; `None` at its end.
async fn receive(stream: &mut UnixStream) -> Option<Frame> {
    let mut decoder = FrameDecoder::new();
    loop {
        let mut chunk = vec![0; decoder.wanted()];
        let got = soon(stream.read(&mut chunk))
            .await
            .ok()
            .filter(|got| *got > 0)?;
        if let Some(decoded) = decoder.feed(&chunk[..got]).unwrap() {
            return Some(decoded.frame);
        }
    }
}

async fn send(stream: &mut UnixStream, header: Header, payload: &[u8]) {
    let bytes = Frame::raw(header, payload.to_vec()).to_wire().unwrap();
    soon(stream.write_all(&bytes)).await.unwrap();
}

async fn error(stream: &mut UnixStream) -> RemoteError {
    let frame = receive(stream).await.unwrap();
    assert_eq!(frame.header.status, Status::Error);
    from_bytes(&frame.payload).unwrap()
}

#[tokio::test]
async fn nonsense_is_answered_and_the_connection_goes_on() {
    let server = test_server();
    let mut stream = connect(&server, SocketAccess::ReadWrite);
    let call = |number: i32, serial| Header {
        procedure: number,
        ..Header::call(procs::CONNECT_OPEN, serial)
    };

    send(&mut stream, call(59, 1), &[]).await;
    let text = "internal error: hypervisor connection not open";
    assert_eq!(error(&mut stream).await.message(), text);
    for (number, serial) in [(999, 2), (0, 3), (-1, 4), (318, 5)] {
        send(&mut stream, call(number, serial), &[]).await;
        let error = error(&mut stream).await;
        assert_eq!(error.message(), format!("unknown procedure: {number}"));
        assert_eq!(
            (error.code, error.domain),
            (ErrorCode::RPC, ErrorDomain::RPC)
        );
    }
    send(
        &mut stream,
        Header {
            program: 4660,
            ..call(1, 6)
        },
        &[],
    )
    .await;
    assert_eq!(
        error(&mut stream).await.message(),
        "Cannot find program 4660 version 1"
    );
    send(
        &mut stream,
        Header {
            version: 9,
            ..call(1, 7)
        },
        &[],
    )
    .await;
    assert_eq!(
        error(&mut stream).await.message(),
        "Cannot find program 536903814 version 9"
    );
    send(
        &mut stream,
        Header {
            status: Status::Error,
            ..call(1, 8)
        },
        &[],
    )
    .await;
    assert_eq!(
        error(&mut stream).await.message(),
        "Unexpected message status 1"
    );
    send(
        &mut stream,
        Header {
            kind: MessageType::Unknown(9),
            ..call(1, 9)
        },
        &[],
    )
    .await;
    assert_eq!(
        error(&mut stream).await.message(),
        "Unexpected message type 9"
    );
    send(
        &mut stream,
        call(1, 10),
        &[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff],
    )
    .await;
    assert!(
        error(&mut stream)
            .await
            .message()
            .starts_with("Unable to decode message payload")
    );
    // Raw data of a stream that isn't there are late, not wrong.
    send(
        &mut stream,
        Header {
            kind: MessageType::Stream,
            status: Status::Continue,
            ..call(201, 11)
        },
        b"x",
    )
    .await;

    send(&mut stream, call(1, 12), &[0; 8]).await;
    let frame = receive(&mut stream).await.unwrap();
    assert_eq!((frame.header.serial, frame.header.status), (12, Status::Ok));
    send(&mut stream, call(1, 13), &[0; 8]).await;
    assert_eq!(
        error(&mut stream).await.message(),
        "internal error: connection already open"
    );
    // A clean end: the answer, then the end of the connection.
    send(&mut stream, call(2, 14), &[]).await;
    assert_eq!(
        receive(&mut stream).await.unwrap().header.status,
        Status::Ok
    );
    assert!(receive(&mut stream).await.is_none());
}

#[tokio::test]
async fn an_oversized_message_is_answered_then_the_connection_ends() {
    let server = test_server();
    let mut stream = connect(&server, SocketAccess::ReadWrite);
    let mut bytes = Frame::raw(Header::call(procs::CONNECT_OPEN, 3), Vec::new())
        .to_wire()
        .unwrap();
    bytes[..4].copy_from_slice(&0x0300_0000u32.to_be_bytes());
    soon(stream.write_all(&bytes)).await.unwrap();
    let error = error(&mut stream).await;
    assert_eq!(error.code, ErrorCode::RPC);
    assert_eq!(
        error.message(),
        "packet of 50331648 bytes is too large, the limit is 33554432"
    );
    assert!(receive(&mut stream).await.is_none());

    // A length that no message has, and a client that leaves in the middle of a message: just the end.
    let mut stream = connect(&server, SocketAccess::ReadWrite);
    soon(stream.write_all(&[0, 0, 0, 3])).await.unwrap();
    assert!(receive(&mut stream).await.is_none());
    let mut stream = connect(&server, SocketAccess::ReadWrite);
    soon(stream.write_all(&[0, 0, 0, 28, 0x20])).await.unwrap();
    soon(stream.shutdown()).await.unwrap();
    assert!(receive(&mut stream).await.is_none());
}

#[tokio::test]
async fn random_bytes_neither_stop_nor_upset_the_server() {
    let seed = std::time::UNIX_EPOCH
        .elapsed()
        .map_or(1, |now| now.as_nanos() as u64)
        | 1;
    println!("seed {seed}");
    let mut state = seed;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let server = test_server();
    for round in 0..60 {
        let mut stream = connect(&server, SocketAccess::ReadWrite);
        for serial in 0..20 {
            let payload: Vec<u8> = (0..next() % 64)
                .map(|_| (next() >> (next() % 64)) as u8)
                .collect();
            let header = Header {
                program: if next() % 8 == 0 {
                    next() as u32
                } else {
                    0x2000_8086
                },
                version: if next() % 8 == 0 { next() as u32 } else { 1 },
                procedure: if serial == 0 && round % 2 == 0 {
                    1
                } else {
                    (next() % 460) as i32
                },
                kind: ((next() % 8) as i32).into(),
                serial: (next() % 8) as u32,
                status: ((next() % 4) as i32).into(),
            };
            let payload = if header.procedure == 1 {
                vec![0; 8]
            } else {
                payload
            };
            let Ok(bytes) = Frame::raw(header, payload).to_wire() else {
                continue;
            };
            if stream.write_all(&bytes).await.is_err() {
                break;
            }
        }
        drop(stream);
    }
    let client = client(&server).await;
    soon(client.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("idle")))
        .await
        .unwrap();
}

fn console() -> DomainOpenConsoleArgs {
    DomainOpenConsoleArgs {
        dom: running(),
        dev_name: None,
        flags: 0,
    }
}

/// Reads data until `len` bytes are there.
async fn read_exactly(stream: &mut Stream, len: usize) -> Vec<u8> {
    let mut data = Vec::new();
    while data.len() < len {
        match soon(stream.reader.next()).await.unwrap() {
            Some(StreamEvent::Data(more)) => data.extend(more),
            other => panic!("{other:?} after {} bytes", data.len()),
        }
    }
    data
}

#[tokio::test]
async fn a_console_passes_data_both_ways_and_ends_from_either_side() {
    let server = test_server();
    let client = client(&server).await;
    // The client ends it.
    let ((), mut stream) = soon(client.call_stream(procs::DOMAIN_OPEN_CONSOLE, &console()))
        .await
        .unwrap();
    assert_eq!(
        read_exactly(&mut stream, 22).await,
        b"hello from the guest\r\n"
    );
    soon(stream.writer.write(b"abc")).await.unwrap();
    assert_eq!(read_exactly(&mut stream, 3).await, b"abc");
    soon(stream.writer.finish()).await.unwrap();
    assert_eq!(soon(stream.reader.next()).await, Ok(None));
    // The guest ends it.
    let ((), mut stream) = soon(client.call_stream(procs::DOMAIN_OPEN_CONSOLE, &console()))
        .await
        .unwrap();
    read_exactly(&mut stream, 22).await;
    soon(stream.writer.write(b"bye")).await.unwrap();
    assert_eq!(
        soon(stream.reader.next()).await,
        Ok(Some(StreamEvent::EndOfData))
    );
    soon(stream.writer.finish()).await.unwrap();
    // The client gives up, and the connection goes on.
    let ((), stream) = soon(client.call_stream(procs::DOMAIN_OPEN_CONSOLE, &console()))
        .await
        .unwrap();
    soon(stream.writer.abort(RemoteError::default())).await;
    // So it does when the stream is just dropped, or the call fails.
    let ((), stream) = soon(client.call_stream(procs::DOMAIN_OPEN_CONSOLE, &console()))
        .await
        .unwrap();
    drop(stream);
    let args = DomainOpenConsoleArgs {
        dom: Domain::new("x", [0; 16], None),
        ..console()
    };
    let error = soon(client.call_stream(procs::DOMAIN_OPEN_CONSOLE, &args))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NO_DOMAIN));
    soon(client.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("idle")))
        .await
        .unwrap();
}

/// More than any buffer on the way holds.
const MUCH: usize = 24 * 1024 * 1024;

#[tokio::test]
async fn a_slow_reader_of_a_download_holds_nobody_else_up() {
    let (router, _) = router();
    let (sent, mut progress) = tokio::sync::watch::channel(0usize);
    let sent = std::sync::Arc::new(sent);
    let router = router.on_stream(
        procs::STORAGE_VOL_DOWNLOAD,
        move |_, _: StorageVolDownloadArgs, stream: Stream| {
            let sent = sent.clone();
            async move {
                tokio::spawn(async move {
                    let chunk = vec![7; 1_000_000];
                    while *sent.borrow() < MUCH {
                        if stream.writer.write(&chunk).await.is_err() {
                            return;
                        }
                        sent.send_modify(|sum| *sum += chunk.len());
                    }
                    let _ = stream.writer.end_of_data().await;
                    let mut reader = stream.reader;
                    while let Ok(Some(event)) = reader.next().await {
                        if event == StreamEvent::Finish {
                            let _ = stream.writer.finish().await;
                            return;
                        }
                    }
                });
                Ok(())
            }
        },
    );
    let server = Server::new(router, ServerConfig::default());
    let slow = client(&server).await;
    let other = client(&server).await;
    let args = StorageVolDownloadArgs::default();
    let ((), mut stream) = soon(slow.call_stream(procs::STORAGE_VOL_DOWNLOAD, &args))
        .await
        .unwrap();
    // The server gets going and then stands still, far from the end.
    soon(progress.wait_for(|sum| *sum > 0)).await.unwrap();
    for _ in 0..50 {
        soon(other.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("idle")))
            .await
            .unwrap();
    }
    assert!(
        *progress.borrow() < MUCH / 2,
        "{} bytes went nowhere",
        *progress.borrow()
    );
    let mut total = 0;
    loop {
        match soon(stream.reader.next()).await.unwrap() {
            Some(StreamEvent::Data(data)) => total += data.len(),
            Some(StreamEvent::EndOfData) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(total, *progress.borrow());
    soon(stream.writer.finish()).await.unwrap();
}

#[tokio::test]
async fn an_upload_arrives_whole_and_may_fail_at_its_end() {
    let (router, _) = router();
    let router = router.on_stream(
        procs::STORAGE_VOL_UPLOAD,
        |_, args: StorageVolUploadArgs, mut stream: Stream| async move {
            tokio::spawn(async move {
                let mut total = 0;
                while let Ok(Some(event)) = stream.reader.next().await {
                    match event {
                        StreamEvent::Data(data) => total += data.len() as u64,
                        StreamEvent::Hole(length) => total += length,
                        StreamEvent::EndOfData => {}
                        StreamEvent::Finish if total == args.length => {
                            let _ = stream.writer.finish().await;
                            return;
                        }
                        StreamEvent::Finish => {
                            let text = format!("{total} bytes came");
                            let error = RemoteError::new(
                                ErrorCode::OPERATION_FAILED,
                                ErrorDomain::STORAGE,
                                text,
                            );
                            stream.writer.abort(error).await;
                            return;
                        }
                    }
                }
            });
            Ok(())
        },
    );
    let server = Server::new(router, ServerConfig::default());
    let client = client(&server).await;
    let data = vec![3; 5_000_000];
    for (length, works) in [(5_000_000, true), (5_000_001, false)] {
        let args = StorageVolUploadArgs {
            length,
            ..Default::default()
        };
        let ((), stream) = soon(client.call_stream(procs::STORAGE_VOL_UPLOAD, &args))
            .await
            .unwrap();
        soon(stream.writer.write(&data)).await.unwrap();
        match soon(stream.writer.finish()).await {
            Ok(()) => assert!(works),
            Err(StreamError::Remote(error)) => {
                assert!(!works);
                assert_eq!(error.message(), "operation failed: 5000000 bytes came");
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_is_forgotten() {
    let (router, mut gone) = router();
    let (ended, mut has_ended) = tokio::sync::mpsc::unbounded_channel();
    let router = router.on_stream(
        procs::DOMAIN_OPEN_CHANNEL,
        move |_, _: DomainOpenChannelArgs, mut stream: Stream| {
            let ended = ended.clone();
            async move {
                tokio::spawn(async move {
                    while let Ok(Some(_)) = stream.reader.next().await {}
                    let _ = ended.send(stream.writer.write(b"x").await);
                });
                Ok(())
            }
        },
    );
    let server = Server::new(router, ServerConfig::default());
    let client = client(&server).await;
    let args = DomainOpenChannelArgs {
        dom: running(),
        name: None,
        flags: 0,
    };
    let ((), stream) = soon(client.call_stream(procs::DOMAIN_OPEN_CHANNEL, &args))
        .await
        .unwrap();
    let register = ConnectDomainEventCallbackRegisterAnyArgs {
        event_id: 0,
        dom: None,
    };
    soon(client.call(procs::CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY, &register))
        .await
        .unwrap();
    assert_eq!(server.clients(), 1);
    std::mem::forget(stream);
    drop(client);
    assert_eq!(
        soon(has_ended.recv()).await,
        Some(Err(StreamError::Disconnected))
    );
    assert_eq!(soon(gone.recv()).await, Some(1));
    assert_eq!(server.clients(), 0);
}

#[tokio::test]
async fn a_stream_ends_with_its_client() {
    let server = test_server();
    let client = client(&server).await;
    let ((), mut stream) = soon(client.call_stream(procs::DOMAIN_OPEN_CONSOLE, &console()))
        .await
        .unwrap();
    read_exactly(&mut stream, 22).await;
    drop(client);
    assert_eq!(
        soon(stream.reader.next()).await,
        Err(StreamError::Disconnected)
    );
    assert_eq!(
        soon(stream.writer.write(b"x")).await,
        Err(StreamError::Disconnected)
    );
}

#[tokio::test]
async fn events_reach_who_asked_in_order() {
    let router = Router::new(())
        .on(procs::CONNECT_OPEN, |_, _: ConnectOpenArgs| async {
            Ok(())
        })
        .on(
            procs::DOMAIN_SUSPEND,
            |call: Call<()>, args: DomainSuspendArgs| async move {
                for detail in 0..100 {
                    let msg = DomainEventLifecycleMsg {
                        dom: args.dom.clone(),
                        event: 3,
                        detail,
                    };
                    let message = DomainEventCallbackLifecycleMsg {
                        callback_id: 4,
                        msg,
                    };
                    call.connection()
                        .send_event(procs::DOMAIN_EVENT_CALLBACK_LIFECYCLE, &message)
                        .unwrap();
                }
                Ok(())
            },
        );
    let server = Server::new(router, ServerConfig::default());
    let client = client(&server).await;
    let mut events = client.take_events().unwrap();
    assert!(client.take_events().is_none());
    soon(client.call(procs::DOMAIN_SUSPEND, &DomainSuspendArgs { dom: running() }))
        .await
        .unwrap();
    for detail in 0..100 {
        let event = soon(events.recv()).await.unwrap();
        assert!(event.get(procs::DOMAIN_EVENT_CALLBACK_REBOOT).is_none());
        let message = event
            .get(procs::DOMAIN_EVENT_CALLBACK_LIFECYCLE)
            .unwrap()
            .unwrap();
        assert_eq!(
            (message.callback_id, message.msg.event, message.msg.detail),
            (4, 3, detail)
        );
    }
    server.shutdown();
    assert!(soon(events.recv()).await.is_none());
}

#[tokio::test]
async fn a_client_that_does_not_answer_is_given_up_and_one_that_does_is_not() {
    let keepalive = Keepalive {
        interval: Duration::from_millis(20),
        count: 3,
    };
    let config = ServerConfig {
        keepalive: Some(keepalive),
        ..Default::default()
    };
    let server = Server::new(router().0, config);
    let lively = client(&server).await;

    let mut dead = connect(&server, SocketAccess::ReadWrite);
    send(
        &mut dead,
        Header::call(procs::CONNECT_SUPPORTS_FEATURE, 0),
        &[0, 0, 0, 10],
    )
    .await;
    let mut pings = 0;
    while let Some(frame) = receive(&mut dead).await {
        pings += usize::from(frame.header == Header::keepalive(procs::KEEPALIVE_PING));
    }
    assert_eq!(pings, 3);
    soon(lively.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("idle")))
        .await
        .unwrap();

    // We answer questions too.
    let mut stream = connect(&server, SocketAccess::ReadWrite);
    send(&mut stream, Header::keepalive(procs::KEEPALIVE_PING), &[]).await;
    assert_eq!(
        receive(&mut stream).await.unwrap().header,
        Header::keepalive(procs::KEEPALIVE_PONG)
    );
}

#[tokio::test]
async fn descriptors_arrive_with_their_call_and_with_its_answer() {
    let router = Router::new(())
        .on(procs::CONNECT_OPEN, |_, _: ConnectOpenArgs| async {
            Ok(())
        })
        .on(
            procs::DOMAIN_FD_ASSOCIATE,
            |call: Call<()>, _: DomainFdAssociateArgs| async move {
                call.answer_with_fds(call.take_fds());
                Ok(())
            },
        );
    let server = Server::new(router, ServerConfig::default());
    let client = client(&server).await;
    let (mut reader, writer) = std::io::pipe().unwrap();
    let fds: Vec<OwnedFd> = vec![
        writer.into(),
        std::fs::File::open("/dev/null").unwrap().into(),
    ];
    let args = DomainFdAssociateArgs::default();
    let ((), mut fds) = soon(client.call_with_fds(procs::DOMAIN_FD_ASSOCIATE, &args, fds))
        .await
        .unwrap();
    assert_eq!(fds.len(), 2);
    let mut writer = std::io::PipeWriter::from(fds.swap_remove(0));
    std::io::Write::write_all(&mut writer, b"it is me").unwrap();
    drop(writer);
    let mut text = String::new();
    std::io::Read::read_to_string(&mut reader, &mut text).unwrap();
    assert_eq!(text, "it is me");
    // The next message is read right behind the descriptors.
    assert!(
        soon(client.call(procs::CONNECT_GET_HOSTNAME, &()))
            .await
            .unwrap_err()
            .code()
            .is_some()
    );
}

#[tokio::test]
async fn further_clients_than_allowed_are_turned_away() {
    let config = ServerConfig {
        max_clients: 1,
        ..Default::default()
    };
    let server = Server::new(router().0, config);
    let first = client(&server).await;
    let mut second = connect(&server, SocketAccess::ReadWrite);
    assert!(receive(&mut second).await.is_none());
    soon(first.call(procs::DOMAIN_LOOKUP_BY_NAME, &by_name("idle")))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_server_that_never_says_anything_is_given_up() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let keepalive = Keepalive {
        interval: Duration::from_millis(10),
        count: 1,
    };
    let config = ClientConfig {
        keepalive: Some(keepalive),
        ..ClientConfig::default()
    };
    let client = Client::new(Transport::unix(ours).unwrap(), config);
    let error = soon(client.open(None, false)).await.unwrap_err();
    assert!(error.to_string().contains("keepalive timeout"), "{error}");
    drop(theirs);
}
