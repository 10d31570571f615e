"""The Hydra applications ``lrcnn-train`` and ``lrcnn-plan``, and the job that they run by default."""
