"""`gemma2-stream ui`: a chat in the browser on Chainlit, from the extra `[ui]`.

`application.py` is the chat, `server.py` the way it is served; nothing else imports them.
"""
