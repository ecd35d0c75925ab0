"""Export: merged 16-bit safetensors that load without qrosa, and adapters in the formats of PEFT."""
