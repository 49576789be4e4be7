"""Pages for browsers: the chat (chat.*), the server's state (status.*), and the API's description (docs.*).

They are plain HTML, CSS and JavaScript without a build step, and load nothing from elsewhere. vendor/ holds other
projects' libraries, unchanged, each with its licence (vendor/README.md).
"""
