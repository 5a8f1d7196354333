"""The page that recognises fruit, as files: the service or any static host serves them."""
