"""One pipeline stage: model, boundary, microbatches, optimizer, averaging, sync, snapshots, data."""
