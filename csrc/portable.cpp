// Symbols that keep the extension loadable with the older C and C++ libraries of manylinux_2_28 (glibc 2.28, GCC 8).
//
// A library that is compiled on a newer system asks for the newest version of each symbol. The linker binds the whole
// extension to these hidden definitions instead, where that version is newer than manylinux_2_28.

#include <new>
#include <sstream>

#define FASTSAM_HIDDEN extern "C" __attribute__((visibility("hidden")))

#ifdef __GLIBC__
// shared_ptr asks glibc 2.32 whether the process has one thread only. 0 is always right: it then counts atomically.
FASTSAM_HIDDEN char fastsam_is_single_threaded __asm__("__libc_single_threaded");
char fastsam_is_single_threaded = 0;
#endif

// pow() of glibc 2.29 computes the same bits as the one before, which only handles errno differently.
#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))
#ifdef __x86_64__
__asm__(".symver fastsam_older_pow, pow@GLIBC_2.2.5");
#else
__asm__(".symver fastsam_older_pow, pow@GLIBC_2.17");
#endif
extern "C" double fastsam_older_pow(double base, double exponent);
FASTSAM_HIDDEN double fastsam_pow(double base, double exponent) __asm__("pow");
double fastsam_pow(double base, double exponent) { return fastsam_older_pow(base, exponent); }
#endif

// torch's headers write error messages into string streams, some of whose members are in libstdc++ only since GCC 9 and
// GCC 11. They are templates.
#ifdef __GLIBCXX__
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();
#if _GLIBCXX_RELEASE >= 11
template std::string std::basic_stringbuf<char>::str() const&;
template std::string std::basic_stringbuf<char>::str() &&;
// What containers call for a size that no memory has.
FASTSAM_HIDDEN __attribute__((noreturn)) void fastsam_throw_bad_array_new_length() __asm__(
    "_ZSt28__throw_bad_array_new_lengthv");
void fastsam_throw_bad_array_new_length() { throw std::bad_array_new_length(); }
#endif
#endif
