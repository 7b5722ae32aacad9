"""What lies in a checkpoint's folder, checked before any of it is believed; no model is made."""
