"""Export: merged 16-bit safetensors that load without qrosa, and PEFT adapters."""
