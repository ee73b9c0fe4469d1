"""Data preparation: raw dumps -> documents -> SentencePiece model -> webdataset shards and a manifest.

Rooms, each of which imports those before it alone (tests/test_rooms.py):

    raw/      raw files as documents: where they lie, how they are packed, what a document is
    shards/   the shard format, its writer and readers: all that training imports
    work/     the work folder, parts of text in it, worker processes
    config/   the keys of a config, the files and folders that they mean, the versions that decide the output
    stages/   what each stage does with one task
    run/      the list of stages and the walk along it; the manifest, the output and what is recorded
    report/   tables, the report with plots, documents for the eye
    cli.py    the command line

This file imports nothing: reading shards needs numpy, safetensors and pydantic only.
"""
