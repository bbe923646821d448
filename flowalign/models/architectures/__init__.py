"""Networks other than the pipeline's own."""
