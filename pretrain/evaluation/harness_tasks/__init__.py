"""Tasks of lm-evaluation-harness that read published files: `lm_eval --include_path` takes this folder."""
