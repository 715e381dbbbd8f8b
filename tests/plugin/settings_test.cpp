// THIMBLE_KV: the texts that it accepts, and that an error names the key or value that is wrong.
#include "engine/settings.h"

#include <gtest/gtest.h>

#include <ostream>
#include <stdexcept>

namespace thimble {
namespace {

TEST(Settings, DefaultsAndWhatIsSaid) {
  const Settings none = Settings::parse("");
  EXPECT_EQ(none.key_bits, 4);
  EXPECT_EQ(none.value_bits, 4);
  EXPECT_EQ(none.window, (WindowSize{128, 40, 16}));
  EXPECT_EQ(none.small_cells, 1024);

  const Settings all = Settings::parse("bits=4/2,window=64,pool=9,small=0,profile=/a/model.thimble.gguf,device=CUDA0");
  EXPECT_EQ(all.key_bits, 4);
  EXPECT_EQ(all.value_bits, 2);
  EXPECT_EQ(all.window, (WindowSize{64, 9, 16}));
  EXPECT_EQ(all.small_cells, 0);
  EXPECT_EQ(all.profile, "/a/model.thimble.gguf");
  EXPECT_EQ(all.device, "CUDA0");
  EXPECT_EQ(Settings::parse("bits=1.25").key_bits, 1.25);
  EXPECT_EQ(Settings::parse("window=0").window, (WindowSize{0, 0, 0}));
  EXPECT_EQ(Settings::parse("window=0,pool=5").window, (WindowSize{0, 5, 16}));
}

TEST(Settings, Retrieval) {
  EXPECT_EQ(Settings::parse("bits=2").top, 0);
  const Settings ram = Settings::parse("bits=2,top=64");
  EXPECT_EQ(ram.top, 64);
  EXPECT_EQ(ram.store, Settings::Store::automatic);
  EXPECT_FALSE(ram.drop_tail);
  EXPECT_EQ(ram.policy, Settings::Policy::all);
  const Settings file = Settings::parse("top=128,store=file,path=/var/tmp,tail=drop,policy=auto");
  EXPECT_EQ(file.store, Settings::Store::file);
  EXPECT_EQ(file.path, "/var/tmp");
  EXPECT_TRUE(file.drop_tail);
  EXPECT_EQ(file.policy, Settings::Policy::automatic);
  EXPECT_EQ(Settings::parse("top=1,store=pinned").store, Settings::Store::pinned);
  EXPECT_EQ(Settings::parse("bits=2,top=64").hash(), Settings::parse("bits=2").hash());
}

TEST(Settings, Calibration) {
  EXPECT_FALSE(Settings::parse("").calibrates());
  const Settings plain = Settings::parse("calibrate=/a/out.gguf,device=CPU");
  EXPECT_TRUE(plain.calibrates());
  EXPECT_TRUE(plain.passthrough());
  EXPECT_EQ(plain.calibrate.path, "/a/out.gguf");
  EXPECT_EQ(plain.calibrate.tokens, 24576);
  EXPECT_EQ(plain.calibrate.context, 0);
  EXPECT_EQ(plain.calibrate.rates, (std::vector<double>{4, 2, 1}));
  EXPECT_FALSE(plain.calibrate.even);
  EXPECT_NO_THROW(Settings::parse("calibrate=p,bits=16"));
  const Settings all = Settings::parse("even=yes,rates=1.25+3,context=4096,tokens=99,calibrate=p");
  EXPECT_EQ(all.calibrate.rates, (std::vector<double>{1.25, 3}));
  EXPECT_EQ(all.calibrate.tokens, 99);
  EXPECT_EQ(all.calibrate.context, 4096);
  EXPECT_TRUE(all.calibrate.even);
}

TEST(Settings, PassThroughIsBothSidesAt16) {
  EXPECT_TRUE(Settings::parse("bits=16").passthrough());
  EXPECT_TRUE(Settings::parse("bits=f16").passthrough());
  EXPECT_FALSE(Settings::parse("bits=16/4").passthrough());
}

TEST(Settings, PrintedTheyReadTheSame) {
  for (const char* text :
       {"", "bits=2", "bits=4/1.5,window=0,small=7", "window=0,pool=3", "window=5", "profile=p,device=CPU",
        "top=9,policy=none", "top=8,store=pinned", "top=64,store=file,path=/p,tail=drop,policy=all", "calibrate=p",
        "calibrate=p,tokens=5,context=6,rates=2+1.5,even=yes,device=CUDA0"}) {
    const Settings s = Settings::parse(text);
    EXPECT_EQ(Settings::parse(s.to_string()).to_string(), s.to_string()) << text;
  }
}

TEST(Settings, HashNamesTheCodes) {
  const uint64_t hash = Settings::parse("bits=4").hash();
  EXPECT_EQ(Settings::parse("bits=4,pool=7,small=0").hash(), hash);
  EXPECT_NE(Settings::parse("bits=2").hash(), hash);
  EXPECT_NE(Settings::parse("bits=4/2").hash(), Settings::parse("bits=2/4").hash());
}

struct Wrong {
  const char* text;
  const char* named;

  friend void PrintTo(const Wrong& wrong, std::ostream* out) { *out << wrong.text; }
};
class SettingsRefuse : public testing::TestWithParam<Wrong> {};

TEST_P(SettingsRefuse, AndNameWhatIsWrong) {
  try {
    Settings::parse(GetParam().text);
    FAIL() << "accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find(GetParam().named), std::string::npos) << error.what();
    EXPECT_EQ(std::string(error.what()).rfind("THIMBLE_KV: ", 0), 0u) << error.what();
  }
}

INSTANTIATE_TEST_SUITE_P(
    , SettingsRefuse,
    testing::Values(Wrong{"bit=4", "'bit'"}, Wrong{"bits", "'bits'"}, Wrong{"bits=", "bits="},
                    Wrong{"bits=5", "bits=5"}, Wrong{"bits=4.0", "bits=4.0"}, Wrong{"bits= 4", "bits= 4"},
                    Wrong{" bits=4", "' bits'"}, Wrong{"bits=4/", "bits="}, Wrong{"bits=4/2/1", "bits=2/1"},
                    Wrong{"bits=4,bits=4", "twice"}, Wrong{"bits=4,", "key=value"}, Wrong{",", "key=value"},
                    Wrong{",bits=4", "key=value"}, Wrong{"bits=4,,small=0", "key=value"}, Wrong{"=4", "''"},
                    Wrong{"window=8+128", "window=8+128"}, Wrong{"window=", "window="}, Wrong{"window=-1", "window=-1"},
                    Wrong{"window=12x", "window=12x"}, Wrong{"window=99999999999", "window=99999999999"},
                    Wrong{"pool=-1", "pool=-1"}, Wrong{"sequences=4", "sequences"}, Wrong{"pool=1e3", "pool=1e3"},
                    Wrong{"small=-1", "small=-1"}, Wrong{"small=", "small="}, Wrong{"profile=", "profile="},
                    Wrong{"device=", "device="}, Wrong{"calibrate=", "calibrate="},
                    Wrong{"calibrate=p,bits=2", "bits="}, Wrong{"calibrate=p,bits=16/4", "bits="},
                    Wrong{"calibrate=p,window=8", "window="}, Wrong{"calibrate=p,profile=auto", "profile="},
                    Wrong{"calibrate=p,small=0", "small="}, Wrong{"calibrate=p,top=8", "top="},
                    Wrong{"tokens=8", "tokens="}, Wrong{"even=yes", "even="}, Wrong{"context=8", "context="},
                    Wrong{"rates=2", "rates="}, Wrong{"calibrate=p,rates=", "rates="},
                    Wrong{"calibrate=p,rates=2+5", "'5'"}, Wrong{"calibrate=p,rates=2+2", "twice"},
                    Wrong{"calibrate=p,rates=2+", "rates=2+"}, Wrong{"calibrate=p,tokens=0", "tokens=0"},
                    Wrong{"calibrate=p,even=1", "even=1"}, Wrong{"top=-1", "top=-1"}, Wrong{"top=", "top="},
                    Wrong{"store=ram", "store="}, Wrong{"top=64,store=disk", "store=disk"},
                    Wrong{"top=64,store=file", "path="}, Wrong{"top=64,path=/tmp", "path="},
                    Wrong{"top=64,store=pinned,path=/tmp", "path="}, Wrong{"top=64,store=file,path=", "path="},
                    Wrong{"top=64,tail=", "tail="}, Wrong{"tail=drop", "tail="},
                    Wrong{"top=64,policy=some", "auto, all, none"}, Wrong{"bits=16,top=64", "bits=16"}));

}  // namespace
}  // namespace thimble
