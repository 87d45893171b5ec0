"""What is on disk: constants, reader, writer, validation of untrusted files, and the base's fingerprint."""
