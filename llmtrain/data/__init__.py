"""From text to rows: sources, tokenizer, token cache, packing, data order, loader."""
