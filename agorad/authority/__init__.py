"""Who may join: accounts, grants that outlive the process, certificates, and the protocol for it.

``accounts`` reads the account file, ``store`` remembers bindings and grants, ``issue`` decides and
signs; ``desk`` serves it and ``agorad.joining`` is the other end.
"""
