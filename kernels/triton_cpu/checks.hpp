// What a launch finds: failed assertions, and in a checked launch every access beside the tensors that were passed and every race.
//
//   a place of a tensor:  last plain store | last load      and, where there is more to say:  last load by another | last atomic | release
//
// The programs of a checked launch run one after another, so that what is found depends on the kernel and not on time. Two accesses race when
// they are of two programs, at least one changes the place, not both are atomic, and nothing orders them. What orders them is an atomic that
// releases all that its program has done, and a later one on the same place, of the other program, that acquires it: C++'s happens-before.
// Clocks are as in C. Flanagan, S. Freund, "FastTrack", PLDI'09, section 3, but kept as a graph, which is flattened when it is asked.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <utility>

enum class Kind : int32_t { NOTHING, OUTSIDE, RACE, ASSERTION, PLACE };
// A volatile load watches: it may stand beside atomics.
enum class How : int32_t { LOAD, STORE, ATOMIC, WATCH };

// The first thing that a launch found. `argument` is a tensor's number, that of an assertion's message, or how many places there are.
struct Found {
    Kind kind;
    int32_t line, argument, program;
    int64_t offset;
    How how, other_how;
    int32_t other_line, other_program;
    int32_t taken;

    bool empty() const { return __atomic_load_n(&taken, __ATOMIC_RELAXED) == 0; }
    bool take() { return __atomic_exchange_n(&taken, 1, __ATOMIC_RELAXED) == 0; }
};

struct Place;
struct More;
// A tensor that was passed; `first` is the first of the same memory, whose places serve for both. A place has as many bytes as the narrowest
// access.
struct Extent {
    char *begin, *end;
    int32_t first, granule;
    Place* places;
    More* more;
};

#ifndef HEADRACE_TRITON_CHECKED

struct Checks {
    Found* found;
    int program = 0;

    Checks(Extent*, int, const int*, Found* found, int64_t) : found(found) {}
    void begin(int number) { program = number; }
    static constexpr bool allow(const volatile void*, int, int, int, How, bool = false, bool = false) { return true; }

#else

// What a program did at a place. `program` is its number plus one; 0 is nobody.
struct Access {
    uint32_t program;
    uint16_t line, epoch : 13, how : 2;
    uint16_t shared : 1;  // of a load: another program has loaded the place too
};
// All that `program` had done up to `epoch`, and what two earlier releases had seen.
struct Release {
    uint32_t program, epoch;
    Release *one, *other;
    Release* made_before;
    Release* next;  // while a graph is walked
    uint32_t walk;  // the last one that came by
};
// What most launches have of a place, and what few have: memory that is not touched costs nothing.
struct Place {
    Access stored, loaded;
};
struct More {
    Access loaded_by_another, updated;
    Release* released;
};

struct Checks {
    static constexpr uint32_t LAST_EPOCH = (1 << 13) - 1;

    Extent* extents;
    int count;
    bool atomics = false;  // whether there was one
    Found* found;
    int program = 0;
    uint32_t epoch = 1;
    int released_at = -1;        // the line that released, when nothing was done since
    Release* known = nullptr;    // what happened before
    Release* own = nullptr;      // this program's last release
    Release* latest = nullptr;   // of all that were made
    Release* flattened = nullptr;
    uint32_t* seen = nullptr;    // of `flattened`: the last epoch of each program
    uint32_t walks = 0;
    int64_t programs;

    Checks(Extent* extents, int count, const int* granules, Found* found, int64_t programs)
        : extents(extents), count(count), found(found), programs(programs) {
        for (int i = 0; i < count; i++) extents[i].granule = granules[i];
        for (int i = 0; i < count; i++)
            if (Extent& first = extents[extents[i].first]; granules[i] < first.granule) first.granule = granules[i];
        for (Extent* one = extents; one < extents + count; one++) {
            if (one != extents + one->first) continue;
            const size_t places = (one->end - one->begin) / one->granule + 1;
            one->places = static_cast<Place*>(std::calloc(places, sizeof(Place)));
            one->more = static_cast<More*>(std::calloc(places, sizeof(More)));
        }
    }
    ~Checks() {
        for (int i = 0; i < count; i++) std::free(extents[i].places), std::free(extents[i].more);
        while (latest) delete std::exchange(latest, latest->made_before);
        std::free(seen);
    }
    Checks(const Checks&) = delete;

    void begin(int number) {
        program = number;
        epoch = 1;
        released_at = -1;
        known = own = nullptr;
    }

    // Whether the access may be done. `argument` is the tensor that the pointer was made from; -1 is any.
    __attribute__((noinline)) bool allow(const volatile void* at, int size, int line, int argument, How how, bool acquires = false, bool releases = false) {
        char* const p = static_cast<char*>(const_cast<void*>(at));
        const int tensor = holder(p, size, argument);
        if (tensor < 0) {
            tell(Kind::OUTSIDE, line, argument, argument < 0 ? 0 : p - extents[argument].begin, how, {});
            return false;
        }
        if (released_at >= 0 && !(how == How::ATOMIC && released_at == line)) {
            epoch += epoch < LAST_EPOCH;
            released_at = -1;
        }
        atomics |= how == How::ATOMIC;
        const Access now{static_cast<uint32_t>(program) + 1, static_cast<uint16_t>(line), static_cast<uint16_t>(epoch), static_cast<uint16_t>(how), 0};
        const Extent& memory = extents[extents[tensor].first];
        for (int64_t offset = p - memory.begin, end = offset + size; offset < end; offset += memory.granule) {
            Place& place = memory.places[offset / memory.granule];
            More& more = memory.more[offset / memory.granule];
            if (const Access* other = race(place, more, now, how)) tell(Kind::RACE, line, tensor, offset, how, *other);
            note(place, more, now, how);
            if (acquires && more.released) know(more.released);
            if (releases) more.released = release(line, acquires ? nullptr : more.released);
        }
        return true;
    }

private:
    int holder(const char* p, int size, int argument) const {
        for (int i = argument < 0 ? 0 : argument; i < (argument < 0 ? count : argument + 1); i++)
            if (p >= extents[i].begin && p + size <= extents[i].end) return i;
        return -1;
    }

    const Access* race(const Place& place, const More& more, const Access& now, How how) {
        if (unordered(place.stored, now)) return &place.stored;
        if (atomics && (how == How::LOAD || how == How::STORE) && unordered(more.updated, now)) return &more.updated;
        if (how == How::LOAD || how == How::WATCH) return nullptr;
        const auto races = [&](const Access& load) { return !(how == How::ATOMIC && static_cast<How>(load.how) == How::WATCH) && unordered(load, now); };
        if (races(place.loaded)) return &place.loaded;
        return place.loaded.shared && races(more.loaded_by_another) ? &more.loaded_by_another : nullptr;
    }

    void note(Place& place, More& more, const Access& now, How how) {
        if (how == How::STORE) {
            place = {now, {}};
            if (atomics) more.updated = {}, more.released = nullptr;
        } else if (how == How::ATOMIC) {
            more.updated = now;
        } else {
            const bool other = place.loaded.program != 0 && place.loaded.program != now.program, shared = other || place.loaded.shared;
            if (other) more.loaded_by_another = place.loaded;
            // A plain load says more than one that watches.
            if (other || how == How::LOAD || static_cast<How>(place.loaded.how) != How::LOAD || place.loaded.program == 0) place.loaded = now;
            place.loaded.shared = shared;
        }
    }

    bool unordered(const Access& before, const Access& now) {
        if (before.program == 0 || before.program == now.program) return false;
        if (!known) return true;
        if (flattened != known) flatten();
        return seen[before.program] < before.epoch;
    }

    void flatten() {
        std::free(seen);
        seen = static_cast<uint32_t*>(std::calloc(programs + 1, sizeof *seen));
        walks++;
        Release* open = nullptr;
        const auto meet = [&](Release* one) {
            if (!one || one->walk == walks) return;
            one->walk = walks;
            one->next = open;
            open = one;
        };
        meet(known);
        while (open) {
            Release* const one = std::exchange(open, open->next);
            if (seen[one->program] < one->epoch) seen[one->program] = one->epoch;
            meet(one->one);
            meet(one->other);
        }
        flattened = known;
    }

    Release* make(uint32_t program, uint32_t epoch, Release* one, Release* other) {
        return latest = new Release{program, epoch, one, other, latest, nullptr, 0};
    }

    void know(Release* one) {
        if (one != known && one != own) known = known ? make(0, 0, known, one) : one;
    }

    Release* release(int line, Release* before) {
        if (!own || own->one != known || own->epoch != epoch) own = make(static_cast<uint32_t>(program) + 1, epoch, known, nullptr);
        released_at = line;
        return before && before != own ? make(0, 0, own, before) : own;
    }

    void tell(Kind kind, int line, int argument, int64_t offset, How how, const Access& other) {
        if (!found->take()) return;
        found->how = how;
        found->other_how = static_cast<How>(other.how);
        found->other_line = other.line;
        found->other_program = static_cast<int32_t>(other.program) - 1;
        report(kind, line, argument, offset);
    }

public:
#endif

    // A place on an axis of `size`: where a tile has no such place, its first one, and the launch fails.
    int64_t place(int64_t at, int size, int line) {
        if (at >= 0 && at < size) return at;
        if (found->take()) report(Kind::PLACE, line, size, at);
        return 0;
    }
    void fail(int line, int message) {
        if (found->take()) report(Kind::ASSERTION, line, message, 0);
    }

private:
    void report(Kind kind, int line, int argument, int64_t offset) {
        found->line = line;
        found->argument = argument;
        found->program = program;
        found->offset = offset;
        found->kind = kind;
    }
};
