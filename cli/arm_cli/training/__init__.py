"""What `arm pretrain`, `arm finetune` and `arm demo` share: options, start and resume, summary, display."""
