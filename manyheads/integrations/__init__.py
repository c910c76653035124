"""Other libraries: the only files that know their names. Each is imported when it is first asked for."""
