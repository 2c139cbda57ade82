"""From bytes to batches: corpora, tokenizers, packing, and the pipeline that joins them. Knows no models."""
