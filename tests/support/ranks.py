"""Tensor-parallel ranks as threads that take turns and meet in each exchange."""

import threading

import torch

from vllm_entropix.kernels.ranks import RankGroup


class Meeting:
    """So many ranks; one works at a time, since Triton's interpreter knows no threads.

    Attributes:
        exchanged: how many numbers a rank sent, per exchange.
    """

    def __init__(self, number):
        self.number = number
        self.exchanged = []
        self._shares = [None] * number
        self._barrier = threading.Barrier(number, timeout=60)
        self._turn = threading.Lock()

    def ranks(self, rank):
        """What one of the ranks knows of the others; None if there is one."""

        def gather(share):
            assert share.dim() == 1
            if rank == 0:
                self.exchanged.append(len(share))
            self._shares[rank] = share
            self._turn.release()
            self._barrier.wait()
            everything = torch.stack(self._shares)
            self._barrier.wait()
            self._turn.acquire()
            return everything

        def complete(everything):
            assert everything.is_contiguous()
            everything.copy_(gather(everything[rank]))

        return RankGroup(self.number, rank, gather, complete) if self.number > 1 else None

    def run(self, work):
        """``work(rank)`` on all ranks; their results in order."""
        results, errors = [None] * self.number, []

        def one(rank):
            try:
                with self._turn:
                    results[rank] = work(rank)
            except threading.BrokenBarrierError:
                pass  # another rank's error is the reason
            except Exception as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results
