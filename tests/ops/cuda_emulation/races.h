// Finds two threads that touch the same memory, one of them writing, with no barrier between them, whatever the order
// they happened to run in.
//
// Every block counts the barriers that its threads have passed. A thread carries a clock: how far, for all it can know,
// each block has come. What another thread did is over if that was before a barrier the clock knows of. The threads of
// one warp are no exception: a shuffle orders no memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace nabla_fast::cuda {

// Per block, the number of barriers passed.
using Clock = std::vector<uint32_t>;

inline void join(Clock& clock, const Clock& other) {
  for (size_t block = 0; block < clock.size(); ++block) {
    clock[block] = std::max(clock[block], other[block]);
  }
}

struct Actor {
  int block, thread;
  const Clock& clock;
};

class Races {
 public:
  // What to look after. Of memory that is not `written` nothing may be read before it is.
  void watch(const char* name, const void* begin, int64_t bytes, bool written) {
    const auto address = reinterpret_cast<uintptr_t>(begin);
    areas_.push_back({name, address, address + static_cast<uintptr_t>(bytes), {}});
    areas_.back().words.resize(static_cast<size_t>(bytes + 3) / 4);
    for (Word& word : areas_.back().words) {
      word.written = written;
    }
  }

  void read(const Actor& actor, const void* address, int64_t bytes) {
    each(address, bytes, [&](const Area& area, Word& word) {
      check(actor, area, word, false);
      add_reader(actor, word);
    });
  }

  void write(const Actor& actor, const void* address, int64_t bytes) {
    each(address, bytes, [&](const Area& area, Word& word) {
      check(actor, area, word, true);
      set_writer(actor, word);
    });
  }

  // From here to `end_copy` the memory may change at any moment: nobody may touch it, not even the thread that copies.
  void begin_copy(const Actor& actor, const void* address, int64_t bytes) {
    write(actor, address, bytes);
    each(address, bytes, [](const Area&, Word& word) { word.copied = true; });
  }

  void end_copy(const Actor& actor, const void* address, int64_t bytes) {
    each(address, bytes, [&](const Area&, Word& word) {
      word.copied = false;
      set_writer(actor, word);
    });
  }

  // Memory that is no more. It counts as a write: who read it must be known to have done so.
  void end(const Actor& actor, const void* address, int64_t bytes) {
    each(address, bytes, [&](const Area& area, Word& word) {
      check(actor, area, word, true);
      word.gone = true;
    });
  }

  // The first mistake, or empty.
  std::string mistake;

 private:
  static constexpr int kMany = -1;

  struct Access {
    int block = -1, thread = 0;
    uint32_t time = 0;

    bool before(const Actor& actor) const {
      return block < 0 || time < actor.clock[block] || (block == actor.block && thread == actor.thread);
    }
  };

  struct Word {
    Access writer, reader;
    bool written = false, copied = false, gone = false, more_readers = false;
  };

  struct Area {
    const char* name;
    uintptr_t begin, end;
    std::vector<Word> words;
  };

  template <typename F>
  void each(const void* address, int64_t bytes, F visit) {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    for (Area& area : areas_) {
      if (begin >= area.begin && begin < area.end) {
        const size_t last = (begin - area.begin + static_cast<size_t>(bytes) + 3) / 4;
        for (size_t i = (begin - area.begin) / 4; i < std::min(last, area.words.size()); ++i) {
          visit(area, area.words[i]);
        }
        return;
      }
    }
  }

  void check(const Actor& actor, const Area& area, const Word& word, bool writes) {
    if (!mistake.empty()) {
      return;
    }
    const std::string verb = writes ? "writes" : "reads";
    if (word.gone) {
      report(actor, area, word, verb + " memory of a block that has left or that is outside the block's own");
    } else if (word.copied) {
      report(actor, area, word, verb + " memory that a copy may be changing");
    } else if (!writes && !word.written) {
      report(actor, area, word, "reads memory that nobody wrote");
    } else if (!word.writer.before(actor)) {
      report(actor, area, word, verb + " what " + name(word.writer) + " writes, with no barrier between them");
    } else if (writes) {
      check_readers(actor, area, word);
    }
  }

  void check_readers(const Actor& actor, const Area& area, const Word& word) {
    std::vector<Access> readers{word.reader};
    if (word.more_readers) {
      readers.insert(readers.end(), more_readers_[&word].begin(), more_readers_[&word].end());
    }
    for (const Access& reader : readers) {
      if (!reader.before(actor)) {
        report(actor, area, word, "writes what " + name(reader) + " reads, with no barrier between them");
        return;
      }
    }
  }

  void set_writer(const Actor& actor, Word& word) {
    if (word.more_readers) {
      more_readers_.erase(&word);
    }
    word.writer = {actor.block, actor.thread, actor.clock[actor.block]};
    word.reader = {};
    word.written = true;
    word.more_readers = false;
  }

  // Of readers of which one is before the other, the later is enough. Others are kept apart, one per block.
  void add_reader(const Actor& actor, Word& word) {
    if (add_to(word.reader, actor)) {
      return;
    }
    word.more_readers = true;
    std::vector<Access>& others = more_readers_[&word];
    if (std::none_of(others.begin(), others.end(), [&](Access& other) { return add_to(other, actor); })) {
      others.push_back({actor.block, actor.thread, actor.clock[actor.block]});
    }
  }

  static bool add_to(Access& reader, const Actor& actor) {
    const uint32_t now = actor.clock[actor.block];
    if (reader.before(actor)) {
      reader = {actor.block, actor.thread, now};
    } else if (reader.block == actor.block) {
      reader.thread = reader.thread == actor.thread ? actor.thread : kMany;
    } else {
      return false;
    }
    return true;
  }

  static std::string name(const Access& access) {
    const std::string thread = access.thread == kMany ? "several threads" : "thread " + std::to_string(access.thread);
    return thread + " of block " + std::to_string(access.block);
  }

  void report(const Actor& actor, const Area& area, const Word& word, const std::string& what) {
    const std::string byte = std::to_string(4 * (&word - area.words.data()));
    mistake = name({actor.block, actor.thread}) + " " + what + " (" + area.name + ", byte " + byte + ")";
  }

  std::vector<Area> areas_;
  std::map<const Word*, std::vector<Access>> more_readers_;
};

}  // namespace nabla_fast::cuda
