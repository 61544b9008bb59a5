class Metrics:
    media_type = "text/plain"

    def __init__(self, engine):
        pass

    def page(self):
        return b""
