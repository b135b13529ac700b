"""The command line, `convservice`: a module per command.

Every command is a thin user of the SDK. `main` reads the arguments, runs one command and turns what it
raises into one line and an exit status. The only part of the SDK that may import the server, and that
only inside the function of the command `serve`.
"""
