//! How a stream ends that was begun: its code stands in the trailers after its last message.

use ambit_model::Code;
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tonic::Status;
use tonic::body::Body;

struct Watched<F> {
    body: Body,
    refused: F,
}

/// The same body; `refused` hears of the code that it ends with, if it ends with one.
pub(super) fn watched(body: Body, refused: impl Fn(Code) + Send + Unpin + 'static) -> Body {
    if body.is_end_stream() { body } else { Body::new(Watched { body, refused }) }
}

impl<F: Fn(Code) + Unpin> http_body::Body for Watched<F> {
    type Data = Bytes;
    type Error = Status;
    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let trailers = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.trailers_ref());
        let code = trailers.and_then(|trailers| trailers.get("ambit-code")?.to_str().ok());
        if let Some(code) = code.and_then(Code::from_text) {
            (self.refused)(code);
        }
        Poll::Ready(frame)
    }
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
