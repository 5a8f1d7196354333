"""The page that recognises fruit, as files. No server: the service or any static host is it."""
