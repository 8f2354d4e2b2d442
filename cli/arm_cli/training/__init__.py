"""Shared parts of `arm pretrain`, `arm finetune` and `arm demo`: options, start, resume, summary, display."""
