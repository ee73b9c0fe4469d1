"""Data preparation: raw dumps -> documents -> SentencePiece model -> webdataset shards and a manifest.

The trainer imports `data_prep.shards.format` and `data_prep.shards.reader` and nothing else from here. Those
two need numpy, safetensors and pydantic only, so this file stays empty of imports.
"""
