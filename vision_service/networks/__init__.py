"""Networks that no library gives us: pure nn.Modules, nothing of ours is imported here."""
