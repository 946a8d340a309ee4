"""What ``agoractl join`` is made of: from a manifest and a few answers to nodes at work.

``source`` reads the manifest from a file or an address, ``findings`` looks at the machine, ``answers``
remembers what was said (never the token), ``cloud`` recognises where it runs, ``layout`` writes one node's
folder a GPU, ``live`` runs the nodes and says what they do.
"""
