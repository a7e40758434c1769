"""Who may say what runs here: signatures, trusted keys, releases that proved themselves."""
