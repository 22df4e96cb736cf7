"""The commands of `longview`, one module each; nothing heavy is imported before a command needs it."""
