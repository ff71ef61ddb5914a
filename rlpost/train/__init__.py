"""The trainer: forward pass, updates with DeepSpeed ZeRO, weights to publish. Never imports `rollout`."""
