"""What is wrong with files of a shard set."""


class ShardError(Exception):
    """A file of a shard set is missing, torn or wrong; the message names it and says what to do."""


class SampleError(ShardError):
    """A member of one sample cannot be read: shard, key, member, and the byte of the shard where it begins."""

    def __init__(self, shard: str, key: str, member: str, offset: int, what: str):
        super().__init__(f"{shard}: {member} of {key} at byte {offset} {what}")
        self.shard, self.key, self.member, self.offset = shard, key, member, offset
