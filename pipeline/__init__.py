"""From documents to a student: stage one (dump), stage two (train), evaluation."""
