"""A gRPC proxy on loopback that sees every message both ways, whatever the method, and notes its size."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc

_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class GrpcRecorder(grpc.GenericRpcHandler):
    """Forwards to `target`. On the wire every call is a stream each way, so one kind of handler does for all."""

    def __init__(self, target: str) -> None:
        self.largest_request_bytes = 0
        self.largest_response_bytes = 0
        self._channel = grpc.insecure_channel(target, options=_UNLIMITED)
        self._server = grpc.server(ThreadPoolExecutor(32), options=_UNLIMITED, handlers=[self])
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        method = details.method

        def forward(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            call = self._channel.stream_stream(method)(self._requests(requests))
            context.add_callback(call.cancel)
            try:
                for response in call:
                    self.largest_response_bytes = max(self.largest_response_bytes, len(response))
                    yield response
            except grpc.RpcError as error:
                context.set_trailing_metadata(tuple(error.trailing_metadata() or ()))
                context.abort(error.code(), error.details())

        return grpc.stream_stream_rpc_method_handler(forward)

    def _requests(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        for request in requests:
            self.largest_request_bytes = max(self.largest_request_bytes, len(request))
            yield request

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._channel.close()
        self._server.stop(grace=1).wait()
