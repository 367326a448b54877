"""The gRPC front: from messages to plain values and back. Protobuf ends here."""
