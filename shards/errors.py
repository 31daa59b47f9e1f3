"""What is wrong with files of a shard set."""


class ShardError(Exception):
    """A file of a shard set is missing, torn or wrong; the message names it and says what to do."""
